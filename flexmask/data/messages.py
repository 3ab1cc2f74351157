"""Conversations: the accepted chat formats, brought into one validated form.

docs/formats.md shows every format with an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexmask.data.content import (
    BLOCK_KEYS,
    REASONING_KEYS,
    read_assistant,
    read_content,
    split_thinking,
)
from flexmask.data.records import (
    HOLD_MESSAGES,
    LABELS,
    MEDIA,
    OTHER_NAMES,
    REFUSED_IN_RECORD,
    WEIGHTS,
    as_messages,
    check_record,
    check_refused,
    rename_keys,
    with_lists,
)
from flexmask.data.tool_calls import read_tool_calls, read_tools
from flexmask.data.tool_parts import split_parts
from flexmask.data.turns import FINISH_KEYS, TRAIN_KEYS, check_finished, join_turns, read_weight
from flexmask.data.values import (
    check_depth,
    check_values,
    parse_json,
    read_text,
    without_nulls,
)
from flexmask.errors import DataError, announce_once, pluralize

ROLES = ("system", "user", "assistant", "tool")
_SYSTEM = ("system", "system_prompt")

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
    "developer": "system",
}
_REFUSED_IN_MESSAGE = {
    **MEDIA,
    "refusal": "what the model is to say is its 'content'",
    **dict.fromkeys(("train_detail", "training_detail"), "a message is trained as a whole"),
}
_ASSISTANT_KEYS = (*REASONING_KEYS, *BLOCK_KEYS, "tool_calls", "function_call")
_OWN_KEYS = {
    *("role", "content"),
    *(*TRAIN_KEYS, *FINISH_KEYS, *_ASSISTANT_KEYS, *_REFUSED_IN_MESSAGE),
}
_RECORD_KEYS = {
    *(*HOLD_MESSAGES, *WEIGHTS, *REFUSED_IN_RECORD, "finish_reason"),
    *(*_SYSTEM, "id", "tools", "functions", "chat_template_kwargs"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated conversation.

    Attributes:
        messages: dicts with `role` (system, user, assistant or tool) and `content` (a string), and
            on assistant messages, only where there is something to say, `reasoning_content`,
            `tool_calls`, `train: False` and a `weight` in the loss that is not 1; other keys are as
            found and reach the template.
        tools: function schemas, or None.
        id: what the data calls the conversation, or None.
        where: the place it came from, such as "conversations.jsonl:17", or None.
        chat_template_kwargs: settings that the record has for the chat template, or None.
        unused_keys: keys of the record that flexmask makes nothing of, such as "source".
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    id: str | None = None
    where: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    unused_keys: tuple[str, ...] = ()

    @property
    def trained(self) -> list[int]:
        """Indices of the assistant messages that are trained."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]

    @property
    def has_greeting(self) -> bool:
        """Whether the first words are the assistant's, which answer nothing and are context."""
        first = next(i for i, message in enumerate(self.messages) if message["role"] != "system")
        return self.messages[first]["role"] == "assistant" and first not in self.trained

    def settings(self, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """The settings of a run for the chat template, with the record's own in their place."""
        return {**(settings or {}), **(self.chat_template_kwargs or {})}


def parse_conversation(
    record: Any,
    where: str | None = None,
    *,
    keep_nulls: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Conversation:
    """Return a record of chat data as a validated `Conversation`.

    Args:
        record: an object with `messages` or (ShareGPT) `conversations`, or what `as_messages`
            takes, with or without `tools`, `system`, `id` and `chat_template_kwargs`; or a list of
            messages; or a `Conversation`, which is returned as is.
        where: the place the record comes from, which begins every error.
        keep_nulls: whether a key of arguments and schemas that is None is meant. Rows of `datasets`
            have None for keys that are not there, so it is left out by default.
        columns: what the data call each of flexmask's names, such as {"messages": "chat"}.

    Raises:
        DataError: the record is in none of the accepted formats.
    """
    if isinstance(record, Conversation):
        return record
    try:
        check_depth(record, "the record")
        record = record if keep_nulls else without_nulls(record)
        if isinstance(record, list):
            first = record[0] if record else None
            if isinstance(first, list) or (isinstance(first, dict) and {*first} & {*HOLD_MESSAGES}):
                raise DataError(
                    f"is a list of {pluralize(len(record), 'conversation')}; write one a line, as "
                    "`jq -c '.[]' FILE.json > FILE.jsonl` does"
                )
            record = {"messages": record}
        if isinstance(record, dict):
            record = with_lists(record, columns or {})
            record = as_messages(rename_keys(record, columns) if columns else record)
        messages = _read_messages(record)
        _check_order(messages)
        tools = _read_tools(record)
        settings = _read_settings(record.get("chat_template_kwargs"))
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from None
    name = record.get("id")
    return Conversation(
        messages,
        tools,
        None if name is None else str(name),
        where,
        settings,
        tuple(
            key
            for key, value in record.items()
            if value is not None
            and key not in _RECORD_KEYS
            and not (key in LABELS and value is True)
        ),
    )


def with_system(conversation: Conversation, text: str) -> Conversation:
    """The same with a system message of this text as message 0, unless it has one there."""
    messages = conversation.messages
    if messages[0]["role"] == "system":
        return conversation
    return replace(conversation, messages=[{"role": "system", "content": text}, *messages])


def last_turn_only(conversation: Conversation) -> Conversation:
    """The same with all that stands before its last turn as context.

    The turn begins behind the last user message before the last trained one.
    """
    messages, last = conversation.messages, conversation.trained[-1]
    start = max((i for i in range(last) if messages[i]["role"] == "user"), default=0)
    context = [
        {**message, "train": False} if message["role"] == "assistant" else message
        for message in messages[:start]
    ]
    return replace(conversation, messages=context + messages[start:])


def _read_messages(record: Any) -> list[dict[str, Any]]:
    if not isinstance(record, dict):
        raise DataError(
            f"a conversation must be an object or a list, got {type(record).__name__}; "
            'write {"messages": [...]}'
        )
    check_record(record)
    names = [name for name in HOLD_MESSAGES if record.get(name) is not None]
    if len(names) != 1:
        keys = [key for key, value in record.items() if value is not None]
        found = " and ".join(map(repr, names)) or (f"the keys {keys}" if keys else "nulls alone")
        raise DataError(
            "a conversation needs one of 'messages' and 'conversations', or 'prompt' and "
            "'completion', 'instruction' and 'output', or 'query' and 'response', got "
            f"{found}; {'keep one of them' if names else _why_no_text(record)}"
        )
    raw = record[names[0]]
    if not isinstance(raw, list):
        raise DataError(
            f"{names[0]!r} must be a list of messages or its JSON text, got {type(raw).__name__}"
        )
    if not raw:
        raise DataError(
            f"{names[0]!r} is empty; a conversation needs a user and an assistant message"
        )
    if record.get("finish_reason") and isinstance(raw[-1], dict):  # of what the model wrote last
        raw = [*raw[:-1], {"finish_reason": record["finish_reason"], **raw[-1]}]
    called: dict[str, Any] = {}  # of calls in content parts, by their ids
    messages = join_turns(
        [
            _read_message(message, f"message {index}")
            for index, whole in enumerate(raw)
            for message in split_parts(whole, f"message {index}", called)
        ]
    )
    system = {key: read_text(record.get(key), key) for key in _SYSTEM}
    if messages[0]["role"] == "system":
        system["message 0"] = messages[0]["content"]
    texts = {text: key for key, text in reversed(system.items()) if text}
    if len(texts) > 1:
        named = " and ".join(reversed(texts.values()))
        raise DataError(f"the system message is given twice, and differently, as {named}")
    if not texts or "message 0" in system:
        return messages
    return [{"role": "system", "content": next(iter(texts))}, *messages]


def _why_no_text(record: dict[str, Any]) -> str:
    if "text" not in record:
        return OTHER_NAMES
    return "of 'text' alone it is not known what is context and what the model is to write"


def _read_message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{what} must be an object, got {type(message).__name__}")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, what)
    if message.get("role") == "tool_call":
        others = {key: value for key, value in message.items() if key != "role"}
        message = _from_sharegpt({**others, "from": "tool_call"}, what)
    role = message.get("role")
    if role in ("developer", "function", "tool_response"):
        role = _SHAREGPT_ROLES[role]
    if role is None:
        raise DataError(f"{what} has no 'role', got the keys {list(message)}; {OTHER_NAMES}")
    if role not in ROLES:
        raise DataError(f"{what} has role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    check_refused(message, _REFUSED_IN_MESSAGE, what)
    others = {k: v for k, v in message.items() if k not in _OWN_KEYS and v is not None}
    check_values(others, what)
    if role == "assistant":
        return {"role": role, **_read_assistant(message, what), **others}
    thinking, text = read_content(message.get("content"), what)
    if thinking or any(map(message.get, _ASSISTANT_KEYS)):
        raise DataError(f"{what} is from the {role}; only the assistant thinks and calls tools")
    if message.get("content") is None:
        raise DataError(f"{what} is from the {role} and has no 'content'")
    for key in TRAIN_KEYS:
        if message.get(key) is True or message.get(key) not in (None, 0, 1):
            raise DataError(
                f"{what} is from the {role} and has {key} {message[key]!r}; only the assistant is "
                "trained"
            )
    return {"role": role, "content": text, **others}


def _read_assistant(message: dict[str, Any], what: str) -> dict[str, Any]:
    fields: dict[str, Any] = read_assistant(message, what)
    calls = message.get("tool_calls") or []
    if isinstance(calls, str) and calls.lstrip().startswith("["):
        calls = parse_json(calls, f"{what}: tool_calls")
    if message.get("function_call"):
        calls = [*calls, message["function_call"]]
    if calls:
        fields["tool_calls"] = read_tool_calls(calls, what)
    if not any(value if key == "tool_calls" else value.strip() for key, value in fields.items()):
        raise DataError(f"{what} is from the assistant and has no content, thinking or tool calls")
    weight = read_weight(message, what)
    if weight == 0:
        return {**fields, "train": False}
    check_finished(message, what)
    return fields if weight in (None, 1) else {**fields, "weight": weight}


def _from_sharegpt(message: dict[str, Any], what: str) -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        raise DataError(
            f"{what} is from {message['from']!r}; senders are system, human, gpt, function_call "
            "and observation"
        )
    value = message.get("content") if message.get("value") is None else message["value"]
    if message.get("content") not in (None, value):
        raise DataError(f"{what} has a 'value' and another 'content'; keep one of them")
    others = {k: v for k, v in message.items() if k not in ("from", "value", "content")}
    if role != "function_call":
        return {**others, "role": role, "content": value}
    thinking, text = split_thinking(read_text(value, f"{what}: value"), what)
    calls = parse_json(text, f"{what}: the value of a function_call")
    calls = calls if isinstance(calls, list) else [calls]
    reasoning = {"reasoning_content": thinking} if thinking else {}
    return {**others, "role": "assistant", "content": "", "tool_calls": calls, **reasoning}


def _check_order(messages: list[dict[str, Any]]) -> None:
    if messages[0]["role"] == "assistant" and messages[0].get("train", True):
        messages[0]["train"] = False
        announce_once(
            "conversations begin with a message of the assistant: it answers nothing, so it is "
            "context for the later ones and not trained"
        )
    trained = Conversation(messages).trained
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant message; there is nothing to train on")
    if not trained:
        raise DataError(
            "every assistant message has train: false or begins the conversation, where it answers "
            "nothing; there is nothing to train on"
        )


def _read_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools, functions = read_tools(record.get("tools")), read_tools(record.get("functions"))
    if tools and functions and tools != functions:
        raise DataError("'tools' and 'functions' (their old name) differ; keep 'tools'")
    return tools or functions


def _read_settings(value: Any) -> dict[str, Any] | None:
    what = "chat_template_kwargs"
    if isinstance(value, str):
        value = parse_json(value, what)
    if not value:
        return None
    if not isinstance(value, dict):
        raise DataError(f"{what} must be an object, got {type(value).__name__}")
    check_values(value, what)
    return value
