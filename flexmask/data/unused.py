"""Keys of the data that nothing is made of: found, and named once with their counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexmask.data.jinja import template_words
from flexmask.data.messages import Conversation

_LISTED = 8
_KNOWN = {
    *("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "train", "weight"),
}


def unused_keys(conversation: Conversation, tokenizer: Any) -> tuple[str, ...]:
    """The keys that neither flexmask nor the chat template reads, each once.

    Those of the record stand as they are; those of its messages and of its settings for the
    template, where the template's source does not hold their name, as "messages.mood" and
    "chat_template_kwargs.tone".
    """
    words = template_words(tokenizer)
    if words is None:
        return conversation.unused_keys
    inner = {
        "messages": {key for message in conversation.messages for key in _inner(message)},
        "chat_template_kwargs": {*(conversation.chat_template_kwargs or {})},
    }
    named = (f"{holder}.{key}" for holder, keys in inner.items() for key in sorted(keys - words))
    return (*conversation.unused_keys, *named)


def _inner(message: dict[str, Any]) -> set[str]:
    """The keys of a message that may mean nothing; the name of a tool goes with `tool_call_id`."""
    return message.keys() - (_KNOWN | {"name"} if message["role"] == "tool" else _KNOWN)


def describe_unused(counts: Mapping[str, int]) -> str:
    """How many conversations have each key that is not used, in one line.

    >>> describe_unused({"source": 1200, "messages.mood": 3})
    'keys not used: source (1,200 conversations), messages.mood (3)'
    """
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{key} ({count:,})" for key, count in most[:_LISTED]]
    listed[0] = listed[0].replace(")", " conversation" + "s" * (most[0][1] != 1) + ")")
    more = f" and {len(most) - _LISTED:,} more" if len(most) > _LISTED else ""
    return f"keys not used: {', '.join(listed)}{more}"
