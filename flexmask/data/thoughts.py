"""Thoughts that a prompt opens or closes, where the template writes the message without them.

A thought stands between two tags. The tags are read off the prompt, by the forms that models use:
<think> </think>, [THINK] [/THINK], <|channel> <channel|>, <|START_THINKING|> <|END_THINKING|>.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# How models write their thinking where their chat template does not say: how the prompt ends that
# opens it, and what is written between thinking and answer.
THINKING_TAGS = {"<think>\n": "\n</think>\n\n"}

# A closing tag, and the opening tag that it answers.
_PAIRS = (
    (r"</([^<>\s]+)>", r"<\1>"),
    (r"\[/([^\[\]\s]+)\]", r"[\1]"),
    (r"<([^<>|\s]+)\|>", r"<|\1>"),
    (r"<\|END_([^<>|\s]+)\|>", r"<|START_\1|>"),
)


def closes_thought(text: str) -> bool:
    """Return whether a closing tag stands in `text`."""
    return any(re.search(closing, text) for closing, _ in _PAIRS)


def behind_closed_thought(
    prompt: str, bare: Callable[[], str], full: str
) -> tuple[str, str] | None:
    """Return the thought that a prompt writes and the message does not, and the message behind it.

    Args:
        prompt: what the model is given at inference.
        bare: gives the text of the same messages without the generation prompt.
        full: the text of the same messages and the next one, which has no thinking.

    None where the prompt does not end with a thought, whole and its own, or where the message
    differs from the prompt in more than that thought.
    """
    text = prompt.rstrip()
    for closing, opening in _PAIRS:
        if (end := re.search(closing + r"\Z", text)) is None:
            continue
        tag = end.expand(opening)
        start = text.rfind(tag, 0, end.start())
        inside = text[start + len(tag) : end.start()]
        if start < 0 or end.group() in inside or not full.startswith(prompt[:start]):
            continue
        written = full[start:]
        if not written.lstrip().startswith(tag) and not bare().rstrip().endswith(text[start:]):
            return prompt[start:], written
    return None


def thought_to_close(prompt: str, full: str) -> tuple[str, str] | None:
    """Return how a thought that the prompt opens is closed, and the message behind it.

    Args:
        prompt: what the model is given at inference.
        full: the text of the same messages and the next one.

    The closing tag is the one that `full` has in place of the opening one, else that of
    `THINKING_TAGS`. None where the prompt does not open the thinking, or where the message differs
    from the prompt in more than that.
    """
    start = max(prompt.rfind("<"), prompt.rfind("["))
    for closing, opening in _PAIRS:
        end = re.compile(closing).match(full, max(start, 0))
        if (
            end
            and prompt[start:].strip() == end.expand(opening)
            and full.startswith(prompt[:start])
        ):
            return end.group(), full[end.end() :]
    for tag, end_of_thought in THINKING_TAGS.items():
        before = prompt.removesuffix(tag)
        if before != prompt and full.startswith(before):
            return end_of_thought, full[len(before) :]
    return None


def filled_thought(prompt: str, written: str, thinking: str) -> str | None:
    """Return a message that begins with an empty thought, <think></think>, with its thinking in it.

    Args:
        prompt: what the model is given at inference; it may end with the opening tag.
        written: what the template writes behind it.
        thinking: the thinking that belongs there.

    None where the message does not begin with an empty thought.
    """
    for closing, opening in _PAIRS:
        if (end := re.search(closing, written)) is None:
            continue
        before, tag = written[: end.start()], end.expand(opening)
        if before.lstrip() == tag or (before == "" and prompt.endswith(tag)):
            return before + thinking + written[end.start() :]
    return None
