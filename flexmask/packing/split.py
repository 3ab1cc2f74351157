"""A tree that is larger than a row, cut into trees that are not.

Each piece holds whole samples and therefore all the history that they need. History that several
pieces hold is computed in each of them, but trained only in the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexmask.packing.split_bound import fewest_tokens
from flexmask.packing.split_branches import branches_of
from flexmask.packing.split_groups import best_groups
from flexmask.tree.tree import Leaf, PrefixTree, Segment


@dataclass(frozen=True, eq=False)
class Split:
    """How a tree is cut; nothing of it looks at tokens, only at lengths.

    Attributes:
        tree: the tree, whole.
        groups: the samples of each piece, as indices into `tree.leaves`.
        too_long: the samples that fit in none, likewise.
        fewest_tokens: what all pieces together have at least, however the tree is cut: theirs, if
            that is proven to be the optimum, else a lower bound.
    """

    tree: PrefixTree
    groups: tuple[tuple[int, ...], ...]
    too_long: tuple[int, ...]
    fewest_tokens: int

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
        return sum(self.num_tokens) - self._num_distinct

    @property
    def fewest_repeated_tokens(self) -> int:
        """What any way to cut this tree computes again at least."""
        return self.fewest_tokens - self._num_distinct

    def piece(self, index: int) -> PrefixTree:
        """Piece `index` as a tree; what an earlier piece trains has no loss here."""
        trained = {s for kept in self.segments[:index] for s in kept}
        return _restrict(self.tree, self.segments[index], self.groups[index], trained)

    def pieces(self) -> list[PrefixTree]:
        """All pieces, in the order of the row."""
        return [self.piece(index) for index in range(len(self))]

    @property
    def _num_distinct(self) -> int:
        kept = {s for segments in self.segments for s in segments}
        return int(self.tree.lengths[sorted(kept)].sum()) if kept else 0


def split_tree(tree: PrefixTree, max_tokens: int) -> Split:
    """The way to cut `tree` into pieces of at most `max_tokens` tokens that computes least twice.

    It is the best there is, proven, where `repeated_tokens` equals `fewest_repeated_tokens`, as for
    all trees of few samples; see docs/packing.md for the others.
    """
    kept: list[int] = []
    too_long: list[int] = []
    for index, leaf in enumerate(tree.leaves):
        (too_long if tree.sample_length(leaf) > max_tokens else kept).append(index)
    if not kept:
        return Split(tree, (), tuple(too_long), 0)
    branches = branches_of(tree, kept, max_tokens)
    fewest = fewest_tokens(tree, branches.ends, max_tokens)
    groups, is_optimal = best_groups(branches, fewest)
    if is_optimal:
        fewest = sum(map(branches.num_tokens, groups))
    return Split(tree, _with_leaves(tree, kept, branches.ends, groups), tuple(too_long), fewest)


def _with_leaves(
    tree: PrefixTree, kept: Iterable[int], ends: list[int], groups: list[list[int]]
) -> tuple[tuple[int, ...], ...]:
    """The samples of each group of paths: each goes to the first group that holds its end."""
    group_of: dict[int, int] = {}
    for number, group in enumerate(groups):
        for index in group:
            for segment in tree.path(ends[index]):
                group_of.setdefault(segment, number)
    leaves: list[list[int]] = [[] for _ in groups]
    for leaf in kept:
        leaves[group_of[tree.leaves[leaf].segment]].append(leaf)
    return tuple(map(tuple, leaves))


def _restrict(
    tree: PrefixTree, kept: list[int], leaves: Iterable[int], trained: set[int]
) -> PrefixTree:
    """The segments `kept` of `tree` with the given leaves; `trained` ones carry no loss again."""
    renamed: dict[int | None, int | None] = {None: None}
    renamed.update((old, new) for new, old in enumerate(kept))
    segments = tuple(
        Segment(tree.segments[s].length, renamed[tree.segments[s].parent], tree.segments[s].kind)
        for s in kept
    )
    new_index = {old: new for new, old in enumerate(kept)}
    ends = tuple(
        Leaf(new_index[tree.leaves[leaf].segment], tree.leaves[leaf].key) for leaf in leaves
    )
    if tree.input_ids is None or tree.loss_weights is None:
        return PrefixTree(segments, ends)
    heads = np.cumsum(tree.lengths) - tree.lengths
    tokens = [np.arange(heads[s], heads[s] + tree.lengths[s]) for s in kept]
    weights = [
        tree.loss_weights[index] * (s not in trained) for s, index in zip(kept, tokens, strict=True)
    ]
    return PrefixTree(
        segments, ends, tree.input_ids[np.concatenate(tokens)], np.concatenate(weights)
    )
