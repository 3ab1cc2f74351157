"""Conversations: the accepted chat formats, brought into one validated form.

docs/formats.md shows every format with an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexmask.data.message_fields import (
    REASONING_KEYS,
    check_values,
    parse_json,
    read_content,
    read_reasoning,
    read_text,
    read_tool_calls,
    read_tools,
    read_train,
    split_thinking,
)
from flexmask.errors import DataError, pluralize

ROLES = ("system", "user", "assistant", "tool")
_HOLD_MESSAGES = ("messages", "conversations")

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
    "developer": "system",
}
_ASSISTANT_KEYS = (*REASONING_KEYS, "tool_calls", "function_call")
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
            _check_one_conversation(record)
            record = {"messages": record}
        messages = _read_messages(record)
        _check_order(messages)
        tools = read_tools(record.get("tools"))
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from None
    name = record.get("id")
    return Conversation(messages, tools, None if name is None else str(name), where)


def _check_one_conversation(record: list[Any]) -> None:
    first = record[0] if record else None
    if isinstance(first, list) or (isinstance(first, dict) and {*first} & {*_HOLD_MESSAGES}):
        raise DataError(
            f"is a list of {pluralize(len(record), 'conversation')}; write one a line, as "
            "`jq -c '.[]' FILE.json > FILE.jsonl` does"
        )


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
    system = read_text(record.get("system"), "system")
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
    check_values(others, what)
    if role == "assistant":
        return {"role": role, **_read_assistant(message, what), **others}
    thinking, text = read_content(message.get("content"), what)
    if thinking or any(map(message.get, _ASSISTANT_KEYS)):
        raise DataError(f"{what} is from the {role}; only the assistant thinks and calls tools")
    if message.get("content") is None:
        raise DataError(f"{what} is from the {role} and has no 'content'")
    return {"role": role, "content": text, **others}


def _read_assistant(message: dict[str, Any], what: str) -> dict[str, Any]:
    part, content = read_content(message.get("content"), what)
    field = read_reasoning(message, what)
    if part.strip() and field:
        raise DataError(f"{what}: thinking is given twice, as a field and as a content part")
    thinking = field or part
    if not thinking:
        thinking, content = split_thinking(content, what)
    elif content.lstrip().startswith("<think>"):
        raise DataError(f"{what}: thinking is given twice, as a field and as <think> in content")
    fields: dict[str, Any] = {"content": content}
    if thinking.strip():
        fields["reasoning_content"] = thinking
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [*calls, message["function_call"]]
    if calls:
        fields["tool_calls"] = read_tool_calls(calls, what)
    if not content.strip() and len(fields) == 1:
        raise DataError(f"{what} is from the assistant and has no content, thinking or tool calls")
    if not read_train(message, what):
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
    thinking, text = split_thinking(read_text(value, f"{what}: value"), what)
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
