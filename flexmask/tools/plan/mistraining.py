"""Tokens that other ways of training on a conversation get wrong, derived from its samples.

A sample is context and completion as at inference, so it is the yardstick: a trained token is right
where it is predicted once, after exactly its sample's tokens. Four habits are held to it.

- One render: the whole conversation is rendered once and its assistant messages are trained. That
  text is the last sample: what a renderer writes behind the last trained token trains nothing. Of
  each earlier completion, the part after it leaves the last sample is wrong: the thinking is not
  in the text, so it is never trained, and what follows the thinking (closing tag, response, stop
  token) is predicted without the thinking before it, if at all.
- Thinking left in the history: one sequence that keeps the thinking of every turn. A completion
  is wrong, all of it, where its own context lacks the thinking of an earlier trained message.
- No loss on turns without thinking: all of their completions.
- The first response token predicted from the wrong position: one token of each turn that thinks.

The last two are those of the paper's released code (arXiv 2504.18246). The counts overlap: each is
what one habit does by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from flexmask.data.messages import Conversation
from flexmask.tree.sample import Sample, common_prefix_length


@dataclass(slots=True)
class Mistraining:
    """Trained tokens (and, where named so, turns and conversations) that a habit gets wrong.

    Attributes:
        one_render_never_trained: one render; tokens up to the end of the thinking, left out.
        one_render_wrong_context: one render; the other tokens of those completions.
        thinking_in_history: tokens of completions whose context should lack earlier thinking.
        no_thinking_no_loss: tokens of turns without thinking.
        no_thinking_turns: how many turns those are.
        first_response_token: one token of each turn that thinks and then says or calls something.
        conversations_with_tool_messages: conversations that the paper's code cannot take at all.
    """

    one_render_never_trained: int = 0
    one_render_wrong_context: int = 0
    thinking_in_history: int = 0
    no_thinking_no_loss: int = 0
    no_thinking_turns: int = 0
    first_response_token: int = 0
    conversations_with_tool_messages: int = 0

    @property
    def one_render(self) -> int:
        """All tokens that one render gets wrong."""
        return self.one_render_never_trained + self.one_render_wrong_context

    def add(self, other: Mistraining) -> None:
        """Add the counts of `other` to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, slots=True)
class _Turn:
    """A sample in the terms of this module; lengths from the start of the sample, in tokens."""

    ids: np.ndarray
    context: int
    thinking_end: int  # one past the last token of the thinking; `context` where there is none

    @property
    def thinks(self) -> bool:
        return self.thinking_end > self.context


def count_mistrained(
    conversation: Conversation, samples: Sequence[Sample], tokenizer: Any
) -> Mistraining:
    """What the four habits get wrong in one conversation.

    Args:
        conversation: the messages.
        samples: what `render_samples` makes of them; a key is the index of a message.
        tokenizer: the one that they were rendered with.
    """
    messages = [conversation.messages[int(str(sample.key))] for sample in samples]
    turns = list(map(partial(_read_turn, tokenizer), samples, messages))
    counts = Mistraining()
    for index, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        num_trained = turn.ids.size - turn.context
        left_at = max(turn.context, common_prefix_length(turn.ids, turns[-1].ids))
        lost = max(0, turn.thinking_end - left_at)
        counts.one_render_never_trained += lost
        counts.one_render_wrong_context += turn.ids.size - left_at - lost
        if any(_is_dropped(earlier, turn) for earlier in turns[:index]):
            counts.thinking_in_history += num_trained
        if not turn.thinks:
            counts.no_thinking_no_loss += num_trained
            counts.no_thinking_turns += 1
        elif message.get("content", "").strip() or "tool_calls" in message:
            counts.first_response_token += 1
    has_tools = any(message["role"] == "tool" for message in conversation.messages)
    counts.conversations_with_tool_messages = int(has_tools)
    return counts


def _read_turn(tokenizer: Any, sample: Sample, message: dict[str, Any]) -> _Turn:
    context = int(np.count_nonzero(sample.loss_weights == 0))
    thinking = message.get("reasoning_content", "").strip()
    length = _thinking_length(tokenizer, sample.input_ids[context:].tolist(), thinking)
    return _Turn(sample.input_ids, context, context + length)


def _is_dropped(earlier: _Turn, turn: _Turn) -> bool:
    """Whether the thinking of `earlier` is missing from the context of `turn`."""
    return earlier.thinks and common_prefix_length(earlier.ids, turn.ids) < earlier.thinking_end


def _thinking_length(tokenizer: Any, completion: list[int], thinking: str) -> int:
    """Tokens of a completion up to the last one that holds a letter of its thinking.

    The completion is decoded, and its tokens' places in the text tell. Where the tokenizer does not
    tell places, or does not give the same tokens again (which do not begin a text), the shortest
    beginning is sought that decodes to so much.
    """
    if not thinking:
        return 0
    decode = partial(
        tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    text = decode(completion)
    stop = max(text.find(thinking), 0) + len(thinking)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] == completion:
            return sum(start < stop for start, _ in encoded["offset_mapping"])
    lengths = range(1, len(completion))
    return 1 + bisect_left(lengths, stop, key=lambda length: len(decode(completion[:length])))
