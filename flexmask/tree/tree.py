"""A prefix tree: the whole specification of a single pass.

A token sees its ancestors and itself, and its position is its depth.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flexmask.errors import MaskError


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that share one path of ancestors.

    Attributes:
        length: number of tokens, at least 1.
        parent: index of the segment whose last token comes before the first one here, or None at a
            root. Parents are listed before their children.
        kind: what the tokens are, such as "reasoning"; for people and pictures only.
    """

    length: int
    parent: int | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a sample ends, and what it trains.

    Attributes:
        segment: the segment whose last token is the sample's last.
        key: the sample's own.
        weights: loss weights of the sample's last tokens, float64 [n]; none before them is trained.
            None without tokens.
    """

    segment: int
    key: Hashable = None
    weights: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A forest of segments, with or without tokens.

    Use `build_tree` for samples, `from_turns` or `from_segments` where only lengths are known.

    Attributes:
        segments: runs of tokens, parents before children.
        leaves: the end of each sample, in the order of the samples.
        input_ids: token ids, int64 [num_tokens], segment after segment; None without tokens.
    """

    segments: tuple[Segment, ...]
    leaves: tuple[Leaf, ...]
    input_ids: np.ndarray | None = None

    @classmethod
    def from_segments(cls, segments: Iterable[Segment]) -> PrefixTree:
        """The tree that `segments` spell out; every segment without children ends a sample.

        Raises:
            MaskError: no segments, a length below 1, or a parent that is not listed before.
        """
        listed = tuple(segments)
        if not listed:
            raise MaskError("a tree needs at least one segment, got none")
        for index, segment in enumerate(listed):
            _check_segment(index, segment)
        inner = {segment.parent for segment in listed}
        leaves = tuple(Leaf(index) for index in range(len(listed)) if index not in inner)
        return cls(listed, leaves)

    @classmethod
    def from_turns(cls, turns: Iterable[tuple[int, int, int]]) -> PrefixTree:
        """The tree of a conversation whose later turns do not see earlier reasoning.

        Each turn is (context, reasoning, response), lengths in tokens. A turn without reasoning is
        its own history; every other but the last is held twice, as trained branch and as history.

        Raises:
            MaskError: no turns, a negative length, or a turn without any token.

        >>> PrefixTree.from_turns([(60, 300, 120), (60, 300, 120)]).num_tokens
        1080
        """
        segments: list[Segment] = []
        leaves: list[Leaf] = []

        def add(length: int, parent: int | None, kind: str) -> int | None:
            if length == 0:
                return parent
            segments.append(Segment(length, parent, kind))
            return len(segments) - 1

        listed = [tuple(turn) if isinstance(turn, Iterable) else (turn,) for turn in turns]
        history: int | None = None
        for index, turn in enumerate(listed):
            is_whole = all(isinstance(length, (int, np.integer)) for length in turn)
            if len(turn) != 3 or not is_whole or min(turn) < 0 or sum(turn) == 0:
                raise MaskError(
                    f"turn {index}: must be (context, reasoning, response) lengths, integers of at "
                    f"least 0, not all 0, got {turn}"
                )
            context, reasoning, response = turn
            prompt = add(context, history, "context")
            thought = add(reasoning, prompt, "reasoning")
            answer = add(response, thought, "response")
            leaves.append(Leaf(len(segments) - 1, index))
            is_last = index == len(listed) - 1
            history = add(response, prompt, "history") if reasoning and not is_last else answer
        if not segments:
            raise MaskError("a conversation needs at least one turn, got none")
        return cls(tuple(segments), tuple(leaves))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each segment, int64 [num_segments]."""
        return np.fromiter((s.length for s in self.segments), np.int64, len(self.segments))

    @cached_property
    def token_starts(self) -> np.ndarray:
        """Where each segment's tokens begin in `input_ids`, int64 [num_segments]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def loss_weights(self) -> np.ndarray | None:
        """The weight with which each token is predicted, float64 [num_tokens]; None without tokens.

        That is the sum over the samples that hold the token.
        """
        if self.input_ids is None:
            return None
        total = np.zeros(self.num_tokens)
        stops = (self.token_starts + self.lengths).tolist()
        for leaf in self.leaves:
            rest, segment = leaf.weights, self.segments[leaf.segment]
            assert rest is not None, "the samples of a tree with tokens have weights"
            stop = stops[leaf.segment]
            while rest.size:
                count = min(rest.size, segment.length)
                total[stop - count : stop] += rest[rest.size - count :]
                rest = rest[: rest.size - count]
                if rest.size:
                    assert segment.parent is not None, "no more weights than tokens"
                    stop, segment = stops[segment.parent], self.segments[segment.parent]
        return total

    @cached_property
    def depths(self) -> np.ndarray:
        """Position of each segment's first token, int64 [num_segments]."""
        ends: list[int] = []
        for segment in self.segments:
            start = 0 if segment.parent is None else ends[segment.parent]
            ends.append(start + segment.length)
        return np.array(ends, np.int64) - self.lengths

    @cached_property
    def segment_pairs(self) -> np.ndarray:
        """Visible pairs (q, k) whose query is in each segment, int64 [num_segments]."""
        return self.lengths * self.depths + self.lengths * (self.lengths + 1) // 2

    @property
    def num_tokens(self) -> int:
        """Tokens of the single pass: nodes of the tree."""
        return int(self.lengths.sum())

    @property
    def num_pairs(self) -> int:
        """Visible pairs (q, k) of the single pass: every token sees its ancestors and itself."""
        return int(self.segment_pairs.sum())

    @property
    def num_sample_tokens(self) -> int:
        """Tokens of the N-pass: the lengths of all samples, added up."""
        return sum(self.sample_length(leaf) for leaf in self.leaves)

    @property
    def depth(self) -> int:
        """Length of the longest sample, in tokens."""
        return int((self.depths + self.lengths).max())

    def sample_length(self, leaf: Leaf) -> int:
        """Number of tokens of the sample that ends at `leaf`."""
        return int(self.depths[leaf.segment] + self.lengths[leaf.segment])

    def path(self, segment: int) -> list[int]:
        """The segments from a root down to `segment`, itself included."""
        path = []
        node: int | None = segment
        while node is not None:
            path.append(node)
            node = self.segments[node].parent
        return path[::-1]

    def __repr__(self) -> str:
        return (
            f"PrefixTree(samples={len(self.leaves)}, segments={len(self.segments)}, "
            f"tokens={self.num_tokens:,} of {self.num_sample_tokens:,})"
        )


def is_count(value: object) -> bool:
    """Whether it is an integer of at least 1."""
    return isinstance(value, (int, np.integer)) and bool(value >= 1)


def one_or_more_trees(trees: PrefixTree | Iterable[PrefixTree], taken_by: str) -> list[PrefixTree]:
    """A tree, or several, as a list.

    Raises:
        MaskError: none, or what `taken_by` was given are no trees.
    """
    listed = [trees] if isinstance(trees, PrefixTree) else check_trees(trees, taken_by)
    if not listed:
        raise MaskError(f"{taken_by} needs at least one tree, got none")
    return listed


def check_trees(trees: Iterable[PrefixTree], taken_by: str) -> list[PrefixTree]:
    """The trees as a list.

    Raises:
        MaskError: what `taken_by` was given are no trees.
    """
    remedy = "make trees with build_tree, PrefixTree.from_turns or PrefixTree.from_segments"
    if isinstance(trees, PrefixTree) or not isinstance(trees, Iterable):
        raise MaskError(f"{taken_by} takes a list of PrefixTree, got {type(trees).__name__}")
    listed = list(trees)
    for index, tree in enumerate(listed):
        if not isinstance(tree, PrefixTree):
            raise MaskError(
                f"{taken_by}: tree {index} must be a PrefixTree, got {type(tree).__name__}; "
                f"{remedy}"
            )
    return listed


def _check_segment(index: int, segment: Segment) -> None:
    if not isinstance(segment, Segment):
        raise MaskError(
            f"segment {index}: must be a Segment(length, parent), got {type(segment).__name__}"
        )
    if not is_count(segment.length):
        raise MaskError(
            f"segment {index}: length must be an integer of at least 1, got {segment.length!r}"
        )
    is_index = isinstance(segment.parent, (int, np.integer)) and 0 <= segment.parent < index
    if segment.parent is not None and not is_index:
        raise MaskError(
            f"segment {index}: parent must be in [0, {index}), got {segment.parent!r}; "
            "list parents before children"
        )
