"""Tool calls and their results as content parts, as Anthropic's Messages API has them."""

from __future__ import annotations

from typing import Any

from flexmask.errors import DataError

_RESULT_KEYS = {"type", "tool_use_id", "content", "is_error", "cache_control"}


def split_parts(message: Any, what: str, names: dict[str, Any]) -> list[Any]:
    """Return a message without parts of tools, as the messages that it is.

    Parts `tool_use` of the assistant become its `tool_calls`, parts `tool_result` of the user
    messages of the role tool before its own. Other messages are returned as they are. `names` of
    calls by their ids grow by those of this message, and name the results.

    Raises:
        DataError: calls do not come last or results first, or a part says more than a message can.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return [message]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    if message.get("role") == "assistant" and "tool_use" in kinds:
        first = kinds.index("tool_use")
        if {*kinds[first:]} != {"tool_use"}:
            raise DataError(
                f"{what} has another content part behind a tool_use; a turn is thinking, content, "
                "tool calls: put the part before them"
            )
        if message.get("tool_calls"):
            raise DataError(f"{what} has 'tool_calls' and parts of type tool_use; keep one of them")
        calls = [{**part, "cache_control": None} for part in content[first:]]
        names.update((str(call.get("id")), call.get("name")) for call in calls)
        return [{**message, "content": content[:first], "tool_calls": calls}]
    if message.get("role") == "user" and "tool_result" in kinds:
        count = kinds.count("tool_result")
        if "tool_result" in kinds[count:]:
            raise DataError(
                f"{what} has a tool_result behind another content part; results come first"
            )
        results = [_read_result(part, message, what, names) for part in content[:count]]
        rest = content[count:]
        return [*results, {**message, "content": rest}] if rest else results
    return [message]


def _read_result(
    part: dict[str, Any], message: dict[str, Any], what: str, names: dict[str, Any]
) -> dict[str, Any]:
    others = sorted(key for key in part.keys() - _RESULT_KEYS if part[key])
    if others:
        raise DataError(f"{what} has a tool_result with more than its content: {others}; remove it")
    result = {**message, "role": "tool", "content": part.get("content") or ""}
    if part.get("tool_use_id"):
        result["tool_call_id"] = part["tool_use_id"]
        result["name"] = names.get(str(part["tool_use_id"]))
    return {**result, "is_error": True} if part.get("is_error") else result
