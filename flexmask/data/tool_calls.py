"""Tools and the calls of them, in any of their usual forms."""

from __future__ import annotations

from typing import Any

from flexmask.data.values import check_values, parse_json, read_text
from flexmask.errors import DataError

# Names of a call's arguments: of OpenAI; of Llama 3, LangChain and Anthropic.
_ARGUMENTS = ("arguments", "parameters", "args", "input")
# What says nothing that the model is to write; the id reaches the template.
_ABOUT = {"id", "type", "index", "call_id", "status", "caller", "thought_signature"}


def read_tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Return tool calls with `type`, `function.name` and `function.arguments` (a dict) each."""
    if not isinstance(value, list):
        raise DataError(
            f"{what}: tool_calls must be a list or its JSON text, got {type(value).__name__}"
        )
    return [_read_tool_call(call, f"{what}: tool call {i}") for i, call in enumerate(value)]


def _read_tool_call(call: Any, what: str) -> dict[str, Any]:
    """Return one tool call in normal form, from the nested or the flat (name, arguments) form."""
    if not isinstance(call, dict):
        raise DataError(f"{what} must be an object, got {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{what} must have a function with a 'name'")
    name = read_text(function["name"], f"{what}: name")
    fields = [*function.items(), *(call.items() if function is not call else ())]
    found = {key: value for key, value in fields if value}
    given = [value for key, value in fields if key in _ARGUMENTS and value is not None]
    others = found.keys() - {*_ARGUMENTS, *_ABOUT, "function", "name", "extra_content"}
    if others or given[1:] != given[:-1]:
        raise DataError(
            f"{what}: arguments of {name!r} must stand under one of {', '.join(_ARGUMENTS)}, and "
            f"nothing beside them; got the keys {list(found)}"
        )
    arguments = given[0] if given else None
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
        if "input_schema" in function and "parameters" not in function:  # as Anthropic calls it
            renamed = {"parameters": function["input_schema"], **function}
            del renamed["input_schema"]
            tool = {**tool, "function": renamed}
        tools.append({"type": "function", **tool})
    return tools
