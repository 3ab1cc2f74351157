"""Conversations: the accepted chat formats, brought into one validated form.

docs/formats.md shows every format with an example.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from flexmask.errors import DataError, pluralize

ROLES = ("system", "user", "assistant", "tool")
_HOLD_MESSAGES = ("messages", "conversations")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_THINK_BLOCK = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
    "developer": "system",
}
_ASSISTANT_KEYS = (*_REASONING_KEYS, "tool_calls", "function_call")
_OWN_KEYS = {"role", "content", "train", "weight", *_ASSISTANT_KEYS}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated conversation.

    Attributes:
        messages: dicts with `role` (system, user, assistant or tool) and `content` (a string), and
            on assistant messages, only where there is something to say, `reasoning_content`,
            `tool_calls` and `train: False`; other keys are as found and reach the template.
        tools: function schemas, or None.
        id: what the data calls the conversation, or None.
        where: the place it came from, such as "conversations.jsonl:17", or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    id: str | None = None
    where: str | None = None

    @property
    def trained(self) -> list[int]:
        """Indices of the assistant messages that are trained."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]


def parse_conversation(record: Any, where: str | None = None) -> Conversation:
    """Return a record of chat data as a validated `Conversation`.

    Args:
        record: an object with `messages` or (ShareGPT) `conversations`, with or without `tools`,
            `system` and `id`; or a list of messages; or a `Conversation`, which is returned as is.
        where: the place the record comes from, which begins every error.

    Raises:
        DataError: the record is in none of the accepted formats.
    """
    if isinstance(record, Conversation):
        return record
    try:
        if isinstance(record, list):
            first = record[0] if record else None
            if isinstance(first, list) or (
                isinstance(first, dict) and {*first} & {*_HOLD_MESSAGES}
            ):
                raise DataError(
                    f"is a list of {pluralize(len(record), 'conversation')}; write one a line, as "
                    "`jq -c '.[]' FILE.json > FILE.jsonl` does"
                )
            record = {"messages": record}
        messages = _read_messages(record)
        _check_order(messages)
        tools = read_tools(record.get("tools"))
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from None
    name = record.get("id")
    return Conversation(messages, tools, None if name is None else str(name), where)


def _read_messages(record: Any) -> list[dict[str, Any]]:
    if not isinstance(record, dict):
        raise DataError(
            f"a conversation must be an object or a list, got {type(record).__name__}; "
            'write {"messages": [...]}'
        )
    names = [name for name in _HOLD_MESSAGES if record.get(name) is not None]
    if len(names) != 1:
        found = " and ".join(map(repr, names)) or f"the keys {list(record)}"
        raise DataError(f"a conversation needs one of 'messages' and 'conversations', got {found}")
    raw = record[names[0]]
    if not isinstance(raw, list):
        raise DataError(f"{names[0]!r} must be a list of messages, got {type(raw).__name__}")
    if not raw:
        raise DataError(
            f"{names[0]!r} is empty; a conversation needs a user and an assistant message"
        )
    messages = [_read_message(message, index) for index, message in enumerate(raw)]
    system = _read_text(record.get("system"), "system")
    if system and messages[0]["role"] == "system":
        raise DataError("the system message is given twice, as 'system' and as message 0")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _read_message(message: Any, index: int) -> dict[str, Any]:
    what = f"message {index}"
    if not isinstance(message, dict):
        raise DataError(f"{what} must be an object, got {type(message).__name__}")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, what)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise DataError(f"{what} has role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    others = {k: v for k, v in message.items() if k not in _OWN_KEYS and v is not None}
    _check_values(others, what)
    if role == "assistant":
        return {"role": role, **_read_assistant(message, what), **others}
    thinking, text = _read_content(message.get("content"), what)
    if thinking or any(map(message.get, _ASSISTANT_KEYS)):
        raise DataError(f"{what} is from the {role}; only the assistant thinks and calls tools")
    if message.get("content") is None:
        raise DataError(f"{what} is from the {role} and has no 'content'")
    return {"role": role, "content": text, **others}


def _read_assistant(message: dict[str, Any], what: str) -> dict[str, Any]:
    part, content = _read_content(message.get("content"), what)
    field = _read_reasoning(message, what)
    if part.strip() and field:
        raise DataError(f"{what}: thinking is given twice, as a field and as a content part")
    thinking = field or part
    if not thinking:
        thinking, content = _split_thinking(content, what)
    elif content.lstrip().startswith("<think>"):
        raise DataError(f"{what}: thinking is given twice, as a field and as <think> in content")
    fields: dict[str, Any] = {"content": content}
    if thinking.strip():
        fields["reasoning_content"] = thinking
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [*calls, message["function_call"]]
    if calls:
        fields["tool_calls"] = _read_tool_calls(calls, what)
    if not content.strip() and len(fields) == 1:
        raise DataError(f"{what} is from the assistant and has no content, thinking or tool calls")
    if not _read_train(message, what):
        fields["train"] = False
    return fields


def _from_sharegpt(message: dict[str, Any], what: str) -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        raise DataError(
            f"{what} is from {message['from']!r}; senders are system, human, gpt, function_call "
            "and observation"
        )
    value = message.get("value", message.get("content"))
    others = {k: v for k, v in message.items() if k not in ("from", "value", "content")}
    if role != "function_call":
        return {**others, "role": role, "content": value}
    thinking, text = _split_thinking(_read_text(value, f"{what}: value"), what)
    calls = parse_json(text, f"{what}: the value of a function_call")
    calls = calls if isinstance(calls, list) else [calls]
    reasoning = {"reasoning_content": thinking} if thinking else {}
    return {**others, "role": "assistant", "content": "", "tool_calls": calls, **reasoning}


def _check_order(messages: list[dict[str, Any]]) -> None:
    trained = Conversation(messages).trained
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant message; there is nothing to train on")
    if not trained:
        raise DataError("every assistant message has train: false; there is nothing to train on")
    if trained[0] == 0:
        raise DataError(
            "message 0 is from the assistant, with nothing to answer; "
            'begin with a user or system message, or give it "train": false'
        )


def _read_text(value: Any, what: str) -> str:
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


def _read_content(value: Any, what: str) -> tuple[str, str]:
    """Return (thinking, text) of a message's content, a string or a list of typed parts."""
    if not isinstance(value, list):
        return "", _read_text(value, f"{what}: content")
    thinking: list[str] = []
    text: list[str] = []
    for index, part in enumerate(value):
        place = f"{what}: content part {index}"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _TEXT_PARTS:
            text.append(_read_text(part.get("text"), place))
        elif kind in _REASONING_PARTS:
            if "".join(text).strip():
                raise DataError(f"{place} is thinking after text; thinking comes first in a turn")
            thinking.append(_read_text(part.get(kind, part.get("text")), place))
        else:
            raise DataError(
                f"{place} is of type {kind!r}; flexmask trains on text: parts are of type text, "
                "reasoning or thinking"
            )
    return "".join(thinking), "".join(text)


def _split_thinking(text: str, what: str) -> tuple[str, str]:
    """Return (thinking, answer) of an assistant's text that may begin with a think block.

    >>> _split_thinking("<think>2 + 2</think>4", "message 1")
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


def _read_reasoning(message: dict[str, Any], what: str) -> str:
    """Return the thinking of a message's own field, under whichever of its names it has one."""
    found = {key: _read_text(message.get(key), f"{what}: {key}") for key in _REASONING_KEYS}
    texts = {text for text in found.values() if text.strip()}
    if len(texts) > 1:
        named = " and ".join(repr(key) for key, text in found.items() if text.strip())
        raise DataError(f"{what}: {named} hold different thinking; keep one of them")
    return texts.pop() if texts else ""


def _read_tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
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
    name = _read_text(function["name"], f"{what}: name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{what}: arguments of {name!r}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{what}: arguments of {name!r} must be an object, got {type(arguments).__name__}"
        )
    _check_values(arguments, f"{what}: arguments of {name!r}")
    own = {} if call.get("id") is None else {"id": call["id"]}
    _check_values(own, what)
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
        _check_values(tool, f"tool {index}")
        tools.append({"type": "function", **tool})
    return tools


def _read_train(message: dict[str, Any], what: str) -> bool:
    """Return whether a message is trained, from its `train` and its `weight` of 0 or 1."""
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{what}: train must be true or false, got {train!r}")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{what}: weight must be 0 or 1, got {weight!r}")
    return train is not False and weight != 0


def _check_values(value: Any, what: str) -> None:
    """Raise where a text inside `value` cannot be encoded, or a number is none of JSON's."""
    if isinstance(value, str):
        _read_text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} must hold what JSON can write, got {value}")
    elif isinstance(value, dict):
        _check_values([*value.keys(), *value.values()], what)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, what)


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
