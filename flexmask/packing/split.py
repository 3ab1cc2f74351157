"""A tree that is larger than a row, cut into trees that are not.

Each piece holds whole samples and therefore all the history that they need. History that several
pieces hold is computed in each of them. A sample is in one piece, and trained there.

To choose the pieces is to pack bins whose items share content, NP-hard as bin packing is. Here the
samples of a piece are neighbours in packed order, and the best of those cuts is found. That takes
about 1% more tokens than a search over all cuts where the lengths of turns are random, and none
more where turns are equal (docs/packing.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from flexmask.tree.layout import lay_out
from flexmask.tree.sample import common_prefix_length
from flexmask.tree.tree import PrefixTree, Segment


@dataclass(frozen=True, eq=False)
class Split:
    """How a tree is cut; nothing of it looks at tokens, only at lengths.

    Attributes:
        tree: the tree that is cut.
        groups: the samples of each piece, as indices into `tree.leaves`.
        too_long: the samples that are in none, likewise.
    """

    tree: PrefixTree
    groups: tuple[tuple[int, ...], ...]
    too_long: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def segments(self) -> tuple[list[int], ...]:
        """The segments of each piece, ascending."""
        tree = self.tree
        return tuple(
            sorted({s for leaf in group for s in tree.path(tree.leaves[leaf].segment)})
            for group in self.groups
        )

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each piece."""
        return [int(self.tree.lengths[kept].sum()) for kept in self.segments]

    @property
    def num_pairs(self) -> list[int]:
        """Visible pairs of each piece."""
        return [int(self.tree.segment_pairs[kept].sum()) for kept in self.segments]

    @property
    def repeated_tokens(self) -> int:
        """Tokens of history that some piece computes again."""
        distinct = set().union(*self.segments)
        return sum(self.num_tokens) - sum(self.tree.segments[s].length for s in distinct)

    def piece(self, index: int) -> PrefixTree:
        """Piece `index` as a tree, which trains what its own samples train."""
        tree, kept = self.tree, self.segments[index]
        new = {segment: number for number, segment in enumerate(kept)}
        segments = tuple(
            Segment(s.length, None if s.parent is None else new[s.parent], s.kind)
            for s in (tree.segments[number] for number in kept)
        )
        ends = (tree.leaves[leaf] for leaf in self.groups[index])
        leaves = tuple(replace(leaf, segment=new[leaf.segment]) for leaf in ends)
        if tree.input_ids is None:
            return PrefixTree(segments, leaves)
        is_kept = np.isin(np.arange(len(tree.segments)), kept)
        return PrefixTree(segments, leaves, tree.input_ids[np.repeat(is_kept, tree.lengths)])

    def pieces(self) -> list[PrefixTree]:
        """All pieces, in the order of the row."""
        return [self.piece(index) for index in range(len(self))]


def split_tree(tree: PrefixTree, max_tokens: int, left_out: Collection[int] = ()) -> Split:
    """The cut of `tree` into pieces of at most `max_tokens` tokens that computes least again.

    That is the least of all cuts into samples that are neighbours in packed order.

    Args:
        tree: the tree.
        max_tokens: the budget of a piece.
        left_out: samples that are in no piece, however short, as indices into `tree.leaves`.
    """
    ends = [leaf.segment for leaf in tree.leaves]
    is_short = [
        tree.sample_length(leaf) <= max_tokens and index not in left_out
        for index, leaf in enumerate(tree.leaves)
    ]
    fitting = {end for end, short in zip(ends, is_short, strict=True) if short}
    starts = lay_out(tree).starts
    inner = {s for end in fitting for s in tree.path(end)[:-1]}  # come with a longer sample
    paths = [tree.path(end) for end in sorted(fitting - inner, key=lambda s: int(starts[s]))]
    group_of: dict[int, int] = {}
    pieces = _group_neighbours(tree, paths, max_tokens)
    for number, piece in enumerate(pieces):
        for path in paths[piece.start : piece.stop]:
            for segment in path:
                group_of.setdefault(segment, number)
    groups: list[list[int]] = [[] for _ in pieces]
    for index, (end, short) in enumerate(zip(ends, is_short, strict=True)):
        if short:
            groups[group_of[end]].append(index)
    too_long = (index for index, short in enumerate(is_short) if not short)
    return Split(tree, tuple(map(tuple, groups)), tuple(too_long))


def _group_neighbours(
    tree: PrefixTree, paths: Sequence[Sequence[int]], max_tokens: int
) -> list[range]:
    """The ranges of paths that together have the fewest tokens, then the fewest ranges.

    By dynamic programming: the union of a range has all of its first path and what each later one
    adds to it, so that a cut computes again what its two neighbours share.

    Args:
        tree: the tree.
        paths: segments from a root to the end of a sample, in packed order; each fits the budget.
        max_tokens: the budget of a range.
    """
    lengths = [int(tree.lengths[path].sum()) for path in paths]
    shared = [0] * len(paths)  # tokens that a path shares with the one before it
    for index in range(1, len(paths)):
        common = common_prefix_length(paths[index - 1], paths[index])
        shared[index] = int(tree.lengths[paths[index][:common]].sum())
    best = [(0, 0, 0)]  # (tokens computed again, ranges, start of the last), by number of paths
    for stop in range(1, len(paths) + 1):
        choices, added = [], 0
        for start in reversed(range(stop)):
            if added + lengths[start] > max_tokens:
                break
            again, number, _ = best[start]
            choices.append((again + shared[start], number + 1, start))
            added += lengths[start] - shared[start]
        best.append(min(choices))
    ranges = []
    stop = len(paths)
    while stop:
        start = best[stop][2]
        ranges.append(range(start, stop))
        stop = start
    return ranges[::-1]
