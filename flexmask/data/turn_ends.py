"""Where a turn of the model ends: the special token at which generation stops.

Most templates write one behind the message. Some models (GLM-4) end their turn with the role of the
next one: a user's after an answer, a tool's after a call. Their templates write that as a part of
the next message, so it is looked up there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from flexmask.errors import TemplateError

_QUESTION = {"role": "user", "content": "asked"}
_ANSWER = {"role": "assistant", "content": "said"}
_FUNCTION = {"name": "look", "arguments": {"at": "it"}}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00000", "function": _FUNCTION}],
}
_RESULT = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": "seen"}


def last_special(tokenizer: Any, text: str) -> str | None:
    """Return the special token that `text` ends with, the longest; None if there is none."""
    tokens = _special_tokens(tokenizer, len(tokenizer))
    return max(filter(text.endswith, tokens), key=len, default=None)


def next_role(
    tokenizer: Any, render: Callable[[list[dict[str, Any]]], str], *, after_call: bool
) -> str:
    """Return what a chat template writes behind an answer or a tool call as a turn follows.

    Args:
        tokenizer: a Hugging Face tokenizer.
        render: messages to text, by the chat template.
        after_call: a tool follows, not a user.

    Returns:
        White space, if any, and a special token; "" if the next turn does not begin with one, or
        begins with that of all text (BOS).
    """
    message, following = (_CALL, _RESULT) if after_call else (_ANSWER, _QUESTION)
    try:
        written = render([_QUESTION, message])
        text = render([_QUESTION, message, following])
    except TemplateError:
        return ""
    if not text.startswith(written):
        return ""
    rest = text[len(written) :]
    begun = rest.lstrip()
    tokens = _special_tokens(tokenizer, len(tokenizer))
    token = max(filter(begun.startswith, tokens), key=len, default="")
    if token in ("", tokenizer.bos_token):
        return ""
    return rest[: len(rest) - len(begun)] + token


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any, num_tokens: int) -> tuple[str, ...]:
    """Return the special tokens of a tokenizer; `num_tokens` notices tokens added later."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
