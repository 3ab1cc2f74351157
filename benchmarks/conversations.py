"""The conversations that are measured, as trees of lengths or as samples with random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flexmask import PrefixTree, Sample, Segment
from flexmask.tree.tree import Leaf

Turn = tuple[int, int, int]  # context, reasoning and response, in tokens


class Message(NamedTuple):
    """An assistant message and the tool result that it asks for; lengths in tokens, 0 for none."""

    reasoning: int
    text: int
    result: int


class AgentTurn(NamedTuple):
    """A user message of `user` tokens, and all that the assistant does about it."""

    user: int
    messages: list[Message]


NUM_TURNS = 16
TURN: Turn = (60, 300, 120)


def long_conversations(num_tokens: int) -> list[PrefixTree]:
    """16-turn conversations of about 9,480 tokens each, `num_tokens` together.

    Where they do not fit a whole number of times, all their lengths are scaled a little.
    """
    unit = PrefixTree.from_turns([TURN] * NUM_TURNS).num_tokens
    number = max(1, round(num_tokens / unit))
    sizes = np.diff(np.linspace(0, num_tokens, number + 1).astype(int)).tolist()
    return [PrefixTree.from_turns(scaled_turns(size)) for size in sizes]


def scaled_turns(num_tokens: int) -> list[Turn]:
    """16 turns in the proportions of TURN whose tree has `num_tokens` tokens.

    Raises:
        ValueError: too few tokens for 16 turns.
    """
    unit = PrefixTree.from_turns([TURN] * NUM_TURNS).num_tokens
    context, reasoning, response = (max(1, length * num_tokens // unit) for length in TURN)
    turns = [(context, reasoning, response)] * NUM_TURNS
    missing = num_tokens - PrefixTree.from_turns(turns).num_tokens
    if missing < 0:
        raise ValueError(f"num_tokens must be enough for {NUM_TURNS} turns, got {num_tokens}")
    turns[0] = (context + missing, reasoning, response)
    return turns


def random_samples(turns: Sequence[Turn], *, vocab_size: int, seed: int) -> list[Sample]:
    """One sample per turn with random tokens; reasoning is dropped from the history."""
    rng = np.random.default_rng(seed)
    samples = []
    history = np.empty(0, np.int64)
    for key, turn in enumerate(turns):
        context, reasoning, response = (rng.integers(vocab_size, size=length) for length in turn)
        ids = np.concatenate((history, context, reasoning, response))
        num_trained = reasoning.size + response.size
        weights = np.arange(ids.size) >= ids.size - num_trained
        samples.append(Sample(ids, weights.astype(np.float64), key))
        history = np.concatenate((history, context, response))
    return samples


def agent_tree(turns: Sequence[AgentTurn]) -> PrefixTree:
    """The tree of an agent's conversation, with one leaf per assistant message.

    Within a turn every message extends the one before it, reasoning and tool result included. Below
    the user's message, the next turn goes on from a copy of them all without any reasoning:

        user, reasoning, call, result, reasoning, answer       two samples, one within the other
         +--- call, result, answer, user, reasoning, answer    the next turn
    """
    segments: list[Segment] = []
    ends: list[int] = []  # the last segment of each assistant message

    def add(length: int, parent: int | None, kind: str) -> int | None:
        if length == 0:
            return parent
        segments.append(Segment(length, parent, kind))
        return len(segments) - 1

    history: int | None = None
    for number, turn in enumerate(turns, 1):
        prompt = last = add(turn.user, history, "context")
        for message in turn.messages:
            last = add(message.reasoning, last, "reasoning")
            last = add(message.text, last, "response")
            ends.append(len(segments) - 1)
            last = add(message.result, last, "tool")
        if number < len(turns):
            history = add(sum(m.text + m.result for m in turn.messages), prompt, "history")
    tree = PrefixTree.from_segments(segments)
    return replace(tree, leaves=tuple(Leaf(end, key) for key, end in enumerate(ends)))
