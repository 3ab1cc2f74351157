"""The fields of one chat message in their normal form: text, thinking, tool calls, tools."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from flexmask.errors import DataError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_THINK_BLOCK = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)


def read_text(value: Any, what: str) -> str:
    """Return `value` if it is text that can be encoded; None counts as no text.

    Args:
        value: the field as found in the data.
        what: the field's name, for errors: "message 3: content".
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{what} holds half of a surrogate pair; write it as whole characters")
    return value


def read_content(value: Any, what: str) -> tuple[str, str]:
    """Return (thinking, text) of a message's content, a string or a list of typed parts."""
    if not isinstance(value, list):
        return "", read_text(value, f"{what}: content")
    thinking: list[str] = []
    text: list[str] = []
    for index, part in enumerate(value):
        place = f"{what}: content part {index}"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _TEXT_PARTS:
            text.append(read_text(part.get("text"), place))
        elif kind in _REASONING_PARTS:
            if "".join(text).strip():
                raise DataError(f"{place} is thinking after text; thinking comes first in a turn")
            thinking.append(read_text(part.get(kind, part.get("text")), place))
        else:
            raise DataError(
                f"{place} is of type {kind!r}; flexmask trains on text: parts are of type text, "
                "reasoning or thinking"
            )
    return "".join(thinking), "".join(text)


def split_thinking(text: str, what: str) -> tuple[str, str]:
    """Return (thinking, answer) of an assistant's text that may begin with a think block.

    >>> split_thinking("<think>2 + 2</think>4", "message 1")
    ('2 + 2', '4')
    """
    if "</think>" not in text:
        if text.lstrip().startswith("<think>"):
            raise DataError(f"{what}: <think> is opened and never closed; add </think>")
        return "", text
    match = _THINK_BLOCK.fullmatch(text)
    assert match is not None, "the text holds </think>"
    thinking, answer = match["thinking"], match["answer"]
    if "<think>" in thinking or "<think>" in answer or "</think>" in answer:
        raise DataError(
            f"{what}: content must hold one think block, at its beginning; put the thinking in "
            "'reasoning_content' if the answer is to hold such tags"
        )
    return thinking.strip("\n"), answer.lstrip("\n")


def read_reasoning(message: dict[str, Any], what: str) -> str:
    """Return the thinking of a message's own field, under whichever of its names it has one."""
    found = {key: read_text(message.get(key), f"{what}: {key}") for key in REASONING_KEYS}
    texts = {text for text in found.values() if text.strip()}
    if len(texts) > 1:
        named = " and ".join(repr(key) for key, text in found.items() if text.strip())
        raise DataError(f"{what}: {named} hold different thinking; keep one of them")
    return texts.pop() if texts else ""


def read_tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Return tool calls with `type`, `function.name` and `function.arguments` (a dict) each."""
    if not isinstance(value, list):
        raise DataError(f"{what}: tool_calls must be a list, got {type(value).__name__}")
    return [_read_tool_call(call, f"{what}: tool call {i}") for i, call in enumerate(value)]


def _read_tool_call(call: Any, what: str) -> dict[str, Any]:
    """Return one tool call in normal form, from the nested or the flat (name, arguments) form."""
    if not isinstance(call, dict):
        raise DataError(f"{what} must be an object, got {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{what} must have a function with a 'name'")
    name = read_text(function["name"], f"{what}: name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{what}: arguments of {name!r}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{what}: arguments of {name!r} must be an object, got {type(arguments).__name__}"
        )
    check_values(arguments, f"{what}: arguments of {name!r}")
    own = {} if call.get("id") is None else {"id": call["id"]}
    check_values(own, what)
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return function schemas, each with its `function` key, or None where there are none."""
    if isinstance(value, str):
        value = parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise DataError(f"tools must be a list or its JSON text, got {type(value).__name__}")
    tools = []
    for index, tool in enumerate(value):
        if isinstance(tool, dict) and "function" not in tool:
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {index} must be a function schema with a 'name'")
        check_values(tool, f"tool {index}")
        tools.append({"type": "function", **tool})
    return tools


def read_train(message: dict[str, Any], what: str) -> bool:
    """Return whether a message is trained, from its `train` and its `weight` of 0 or 1."""
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{what}: train must be true or false, got {train!r}")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{what}: weight must be 0 or 1, got {weight!r}")
    return train is not False and weight != 0


def check_values(value: Any, what: str) -> None:
    """Raise where a text inside `value` cannot be encoded, or a number is none of JSON's."""
    if isinstance(value, str):
        read_text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} must hold what JSON can write, got {value}")
    elif isinstance(value, dict):
        check_values([*value.keys(), *value.values()], what)
    elif isinstance(value, list):
        for item in value:
            check_values(item, what)


def parse_json(text: str, what: str) -> Any:
    """Return the value of a JSON text; DataError where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} is not JSON ({error.msg} at character {error.pos}): {text[:40]!r}"
        ) from None
    except ValueError as error:  # the digits that Python converts have a limit
        reason = str(error).partition(":")[0]
        raise DataError(f"{what} holds a number that is too long: {reason}") from None
    except RecursionError:
        raise DataError(f"{what} is nested too deep") from None
