"""Where the branches of conversations come from, found out from what the template writes.

A tree with L leaves has L - 1 branches: each leaf but the last is left by the one after it. Both
are written once more with a mark in place of every text, name and argument of the conversation and
its tools, so that the place where the later text leaves the earlier one tells which part comes next
in each. The first rule that applies names the cause:

- other tokens: the texts do not differ; where prompt and completion meet, the whole text is cut
  into other tokens.
- dropped thinking: the earlier text goes on with a thinking that the later one does not have.
- rewritten history: it goes on with other words of a message that the later one does not have.
- rewritten stop token: an assistant message has just ended, and the same words come next, or none.
- dropped empty thought: the same words come next, those of an assistant message without thinking,
  and less stands before them.
- tools: a function, a call or an argument comes next in one of them, or has just ended.
- rewritten history: any other difference, white space in the words of a message among them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeGuard

from flexmask.data.checks import Marks, mark_message
from flexmask.data.messages import Conversation
from flexmask.data.template import ChatTemplate, Message
from flexmask.tree.sample import Sample, common_prefix_length
from flexmask.tree.tree import PrefixTree


def leaf_samples(tree: PrefixTree) -> list[int]:
    """The samples that no other goes on from, in order: one for each leaf, of equal ones the last.

    A tree with one leaf is a chain: every sample is the beginning of the longest.
    """
    inner = {segment.parent for segment in tree.segments}
    ends = {leaf.segment: index for index, leaf in enumerate(tree.leaves)}
    return sorted(index for segment, index in ends.items() if segment not in inner)


def count_branches(
    conversation: Conversation, leaves: Sequence[Sample], template: ChatTemplate
) -> Counter[str]:
    """The causes of the branches between the leaves of one conversation, each branch one.

    Args:
        conversation: the messages.
        leaves: the samples of `leaf_samples`; a key is the index of a message.
        template: writes the messages as it wrote the samples.
    """
    counts: Counter[str] = Counter()
    if len(leaves) < 2:
        return counts
    marks = Marks()
    tools = [
        {**tool, "function": {**tool["function"], "name": marks.add(f"tool {index}")}}
        for index, tool in enumerate(template.tools or [])
    ]
    owners = [-1] * len(marks)
    messages = []
    for index, message in enumerate(conversation.messages):
        messages.append(mark_message(message, marks))
        owners += [index] * (len(marks) - len(owners))
    parts = [_Part(*of) for of in zip(owners, marks.values(), strict=True)]
    marked = ChatTemplate(template.tokenizer, tools, template.settings)
    ends = [int(str(sample.key)) for sample in leaves]
    texts = [_read(_write(marked, messages, end), parts) for end in ends]
    for index, (earlier, later) in enumerate(pairwise(texts)):
        cause = _cause(earlier, later, conversation.messages)
        if cause is None:
            before, after = (
                _write(template, conversation.messages, end) for end in ends[index:][:2]
            )
            cause = "other tokens" if after.startswith(before) else "rewritten history"
        counts[cause] += 1
    return counts


def _write(template: ChatTemplate, messages: list[Message], index: int) -> str:
    """The text that ends with message `index`."""
    prompt = template.prompt(messages[:index])
    return prompt + template.completion(prompt, messages[:index], messages[index])


class _Part(NamedTuple):
    """A text, name or argument: message `owner` (-1: the tools), and what it is there."""

    owner: int
    name: str

    @property
    def is_tool(self) -> bool:
        return self.name not in ("thinking", "content")


class _Place(NamedTuple):
    """Where the mark of a part stands in a text, or (`part` None) where the text ends."""

    start: int
    end: int
    part: _Part | None


class _Text(NamedTuple):
    text: str
    places: list[_Place]

    def around(self, position: int) -> tuple[_Part | None, _Place]:
        """The part that ends last before `position`, and the place of the one after it."""
        at = sum(place.end <= position for place in self.places[:-1])
        return self.places[at - 1].part if at else None, self.places[at]


def _read(text: str, parts: Sequence[_Part]) -> _Text:
    places = [_Place(*m.span(), parts[int(m[1])]) for m in re.finditer(Marks.PATTERN, text)]
    return _Text(text, [*places, _Place(len(text), len(text), None)])


def _cause(earlier: _Text, later: _Text, messages: list[Message]) -> str | None:
    """The cause for which `later` leaves `earlier`; None where it does not leave it."""
    fork = common_prefix_length(earlier.text, later.text)
    if fork == len(earlier.text):
        return None
    (ended, left), (_, found) = earlier.around(fork), later.around(fork)
    old, new = left.part, found.part
    if old and not old.is_tool and old not in (place.part for place in later.places):
        return "dropped thinking" if old.name == "thinking" else "rewritten history"
    if old in (new, None) and (old is None or ended is None or ended.owner != old.owner):
        # The same words follow, of another message: what differs is written between the two.
        if _is_assistant(ended, messages):
            return "rewritten stop token"
        is_plain = _is_assistant(old, messages) and "reasoning_content" not in messages[old.owner]
        if is_plain and left.start > found.start:
            return "dropped empty thought"
    if any(part and part.is_tool for part in (ended, old, new)):
        return "tools"
    return "rewritten history"


def _is_assistant(part: _Part | None, messages: list[Message]) -> TypeGuard[_Part]:
    return part is not None and part.owner >= 0 and messages[part.owner]["role"] == "assistant"
