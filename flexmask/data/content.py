"""What a message says: thinking and text, as fields, typed parts, blocks or tags."""

from __future__ import annotations

import re
from typing import Any

from flexmask.data.values import read_text
from flexmask.errors import DataError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
BLOCK_KEYS = ("reasoning_details", "thinking_blocks")  # of OpenRouter; of LiteLLM and Anthropic

# Types of parts, and the keys that hold the words of each.
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking", "reasoning.text", "reasoning.summary")
_INNER_PARTS = ("text", "summary_text", "reasoning_text")  # of a list within a thinking part
_TEXT_KEYS = ("text", "value", "content")
_THOUGHT_KEYS = ("thinking", "reasoning", "summary", *_TEXT_KEYS)
_ABOUT = {"type", "id", "format", "signature", "status", "phase", "annotations", "citations"}

_OPENED = re.compile(r"\s*<think>(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)
# The end of a thought that the prompt opened: the tag begins the text, or a line.
_CLOSED = re.compile(r"(?P<thinking>(?:.*?\n)??)[ \t]*</think>(?P<answer>.*)", re.DOTALL)


def read_content(value: Any, what: str) -> tuple[str, str]:
    """Return (thinking, text) of a message's content, a string or a list of typed parts.

    Raises:
        DataError: a part is of another type, or its words are not found where they belong.
    """
    if not isinstance(value, list):
        return "", read_text(value, f"{what}: content")
    thinking: list[str] = []
    text: list[str] = []
    for index, part in enumerate(value):
        place = f"{what}: content part {index}"
        kind = _kind(part)
        if kind in _TEXT_PARTS:
            text.append(_words(part, _TEXT_KEYS, place))
        elif kind in _REASONING_PARTS:
            if "".join(text).strip():
                raise DataError(f"{place} is thinking after text; thinking comes first in a turn")
            thinking.append(_words(part, _THOUGHT_KEYS, place))
        else:
            raise DataError(
                f"{place} is of type {kind!r}; flexmask trains on text: parts are of type text, "
                "reasoning or thinking"
            )
    return "".join(thinking), "".join(text)


def read_assistant(message: dict[str, Any], what: str) -> dict[str, str]:
    """Return `content` of an assistant's message, and `reasoning_content` where it thinks.

    Thinking that is said to be empty is kept as "" where the answer holds a closing tag, which
    would otherwise be taken for the end of a thought.

    Raises:
        DataError: thinking is given twice, holds its own end, or stands where it cannot be.
    """
    part, content = read_content(message.get("content"), what)
    field = _read_reasoning(message, what)
    if part.strip() and field:
        raise DataError(f"{what}: thinking is given twice, as a field and as a content part")
    thinking = field or part
    is_opened = content.lstrip().startswith("<think>")
    if thinking and is_opened:
        raise DataError(f"{what}: thinking is given twice, as a field and as <think> in content")
    if not thinking and (is_opened or field is None):
        thinking, content = split_thinking(content, what)
    elif not thinking and "<think>" not in content and _CLOSED.fullmatch(content):
        raise DataError(
            f"{what}: the thinking is empty, and content holds the end of a thought, </think>; "
            "write <think> at its beginning, or remove the tag"
        )
    if "</think>" in thinking:
        raise DataError(
            f"{what}: the thinking holds </think>, at which it would end at inference; remove the "
            'tag or give the message "train": false and no thinking'
        )
    if thinking.strip():
        return {"content": content, "reasoning_content": thinking}
    if "</think>" in content:
        return {"content": content, "reasoning_content": ""}
    return {"content": content}


def split_thinking(text: str, what: str) -> tuple[str, str]:
    """Return (thinking, answer) of an assistant's text that may begin with a think block.

    The opening tag may be missing, as in what a model writes whose prompt opens the thinking, if
    the closing one begins a line.

    >>> split_thinking("<think>2 + 2</think>4", "message 1")
    ('2 + 2', '4')
    """
    is_opened = text.lstrip().startswith("<think>")
    if "</think>" not in text:
        if is_opened:
            raise DataError(f"{what}: <think> is opened and never closed; add </think>")
        return "", text
    match = (_OPENED if is_opened else _CLOSED).fullmatch(text)
    tags = text.count("<think>") + text.count("</think>")
    if match is None and tags == 1:
        raise DataError(
            f"{what}: content holds </think> without <think>; write <think> at its beginning if "
            'the text before is thinking, or \'"reasoning_content": ""\' if all of it is answer'
        )
    if match is None or tags != 1 + is_opened:
        raise DataError(
            f"{what}: content must hold one think block, at its beginning; put the thinking in "
            "'reasoning_content' if the answer is to hold such tags"
        )
    return match["thinking"].strip("\n"), match["answer"].lstrip("\n")


def _read_reasoning(message: dict[str, Any], what: str) -> str | None:
    """Return the thinking of a message's own fields, "" if said to be empty, None if not given."""
    found = {}
    for key in (*REASONING_KEYS, *BLOCK_KEYS):
        value = message.get(key)
        if value is not None:
            place = f"{what}: {key}"
            found[key] = _block_text(value, place) if key in BLOCK_KEYS else read_text(value, place)
    texts = {"".join(text.split()): key for key, text in reversed(found.items()) if text.strip()}
    if len(texts) > 1:
        named = " and ".join(map(repr, sorted(texts.values())))
        raise DataError(f"{what}: {named} hold different thinking; keep one of them")
    if texts:
        return found[texts.popitem()[1]]
    return "" if {*found} & {*REASONING_KEYS} else None


def _block_text(blocks: Any, what: str) -> str:
    """Return the thinking of a list of blocks, as APIs return it beside the content."""
    if not isinstance(blocks, list):
        raise DataError(f"{what} must be a list of blocks, got {type(blocks).__name__}")
    texts = []
    for index, block in enumerate(blocks):
        place = f"{what}: block {index}"
        if _kind(block) not in _REASONING_PARTS:
            raise DataError(
                f"{place} is of type {_kind(block)!r}, of which the words cannot be read; leave "
                'the conversation out, or give the message "train": false and no thinking'
            )
        texts.append(_words(block, _THOUGHT_KEYS, place))
    return "".join(texts)


def _kind(part: Any) -> Any:
    """The type that a part says it has; a string is text."""
    if isinstance(part, str):
        return "text"
    return part.get("type") if isinstance(part, dict) else type(part).__name__


def _words(part: Any, keys: tuple[str, ...], what: str) -> str:
    """Return the words of a part, under whichever of `keys` it has them.

    Raises:
        DataError: it has none of the keys, different words under two, or more words elsewhere.
    """
    if isinstance(part, str):
        return read_text(part, what)
    texts = {}
    for key in keys:
        value = part.get(key)
        if isinstance(value, list):
            texts[key] = _inner_words(value, f"{what}: {key}")
        elif value is not None:
            texts[key] = read_text(value, what)
    if not texts:
        raise DataError(
            f"{what} has its text under none of {', '.join(map(repr, keys))}, but the keys "
            f"{list(part)}; rename the one that holds it"
        )
    others = [key for key in part.keys() - {*keys, *_ABOUT} if isinstance(part[key], str | list)]
    if any(map(part.get, others)):
        raise DataError(f"{what} has text that is not read, under {sorted(others)}; remove it")
    different = {text for text in texts.values() if text}
    if len(different) > 1:
        named = " and ".join(repr(key) for key, text in texts.items() if text)
        raise DataError(f"{what}: {named} hold different texts; keep one of them")
    return different.pop() if different else ""


def _inner_words(parts: list[Any], what: str) -> str:
    """Return the words of the parts within a part; those of a summary are paragraphs."""
    for part in parts:
        if _kind(part) not in _INNER_PARTS:
            raise DataError(f"{what} holds a part of type {_kind(part)!r}; it must be of text")
    between = "\n\n" if what.endswith(": summary") else ""
    return between.join(_words(part, _TEXT_KEYS, what) for part in parts)
