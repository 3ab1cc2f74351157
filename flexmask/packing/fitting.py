"""Trees that all fit a budget, on top of any indexable collection of trees.

What is larger is cut up front, so that whatever comes after (sampler, collator, model) meets only
trees that fit. Sizes are known without tokens: a tree is read here only if it is too large.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from flexmask.errors import DataError, pluralize
from flexmask.packing.split import Split, split_tree
from flexmask.packing.truncate import truncate_tree
from flexmask.tree.tree import PrefixTree, is_count

Overflow = Literal["split", "drop", "truncate", "error"]


@dataclass(slots=True)
class SplitCount:
    """What cutting came to.

    Attributes:
        trees: how many were larger than the budget.
        pieces: into how many they were cut.
        repeated_tokens: history that pieces compute again.
        dropped_samples: samples longer than the budget by themselves.
        lost_trees: trees of which no sample is left.
        truncated_samples: samples longer than the budget that kept their first tokens.
    """

    trees: int = 0
    pieces: int = 0
    repeated_tokens: int = 0
    dropped_samples: int = 0
    lost_trees: int = 0
    truncated_samples: int = 0

    def add(self, split: Split) -> None:
        """Count one tree."""
        self.trees += 1
        self.pieces += len(split)
        self.repeated_tokens += split.repeated_tokens
        self.dropped_samples += len(split.too_long)
        self.lost_trees += not len(split)

    def __str__(self) -> str:
        line = (
            f"{self.trees:,} larger, cut into {pluralize(self.pieces, 'piece')}, with "
            f"{pluralize(self.repeated_tokens, 'token')} of history computed again"
        )
        if self.truncated_samples:
            line += f"; {pluralize(self.truncated_samples, 'sample')} truncated to the budget"
        if self.dropped_samples:
            line += f"; {pluralize(self.dropped_samples, 'sample')} dropped, longer than the budget"
        if self.lost_trees:
            line += (
                f", and with {'it' if self.dropped_samples == 1 else 'them'} "
                f"{pluralize(self.lost_trees, 'whole conversation')}"
            )
        return line


def check_budget(max_tokens: int | None, on_overflow: Overflow) -> None:
    """Raise DataError for a budget that is no integer of at least 1, or an unknown policy."""
    if on_overflow not in get_args(Overflow):
        raise DataError(f"on_overflow must be one of {get_args(Overflow)}, got {on_overflow!r}")
    if max_tokens is not None and not is_count(max_tokens):
        raise DataError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")


def sizes_of(trees: Any) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, visible pairs) of each tree, both int64 [n].

    Args:
        trees: what has `num_tokens` and `num_pairs` as arrays, such as `PreparedDataset`, or a
            sequence of PrefixTrees.

    Raises:
        DataError: arrays that are not [n].
    """
    if hasattr(trees, "num_tokens") and hasattr(trees, "num_pairs"):
        sizes = (np.asarray(trees.num_tokens, np.int64), np.asarray(trees.num_pairs, np.int64))
        if any(array.shape != (len(trees),) for array in sizes):
            raise DataError(
                f"num_tokens and num_pairs must be [{len(trees)}], one entry per tree, "
                f"got {[list(array.shape) for array in sizes]}"
            )
        return sizes
    listed = [(tree.num_tokens, tree.num_pairs) for tree in trees]
    tokens, pairs = np.array(listed, np.int64).reshape(-1, 2).T
    return tokens, pairs


class FittedTrees:
    """The trees of a dataset, those larger than the budget replaced by pieces that are not.

    A dataset in its own right: a length, items that are PrefixTrees, and their sizes.

    Attributes:
        trees: the dataset.
        num_tokens, num_pairs: of each item, int64 [len(self)].
        max_tokens: the budget that all of them meet.
        split: what cutting came to.
        dropped: (place, sample key) of the samples longer than the budget that are left out.
        truncated: the same of those of which the first tokens are left.
    """

    def __init__(self, trees: Any, max_tokens: int, *, on_overflow: Overflow = "split") -> None:
        """Cut what has to be cut.

        Args:
            trees: PrefixTrees by index, with `num_tokens` and `num_pairs` as arrays or not; where
                it has a method `place(index)`, errors name a tree by that.
            max_tokens: the budget, in tokens.
            on_overflow: as in `pack`.

        Raises:
            DataError: a tree or sample that may not be cut or left out, or nothing left.
        """
        check_budget(max_tokens, on_overflow)
        self.trees = trees
        self.max_tokens = max_tokens
        self.split = SplitCount()
        self.dropped: list[tuple[str, Hashable]] = []
        self.truncated: list[tuple[str, Hashable]] = []
        self._is_truncated = on_overflow == "truncate"
        self._splits: dict[int, Split] = {}
        tokens, pairs = sizes_of(trees)
        items = [np.stack((np.arange(len(tokens)), np.zeros_like(tokens), tokens, pairs))]
        items[0] = items[0][:, tokens <= max_tokens]
        for index in np.flatnonzero(tokens > max_tokens).tolist():
            split = self._cut(index, on_overflow)
            pieces = (np.full(len(split), index), np.arange(len(split)))
            items.append(np.stack((*pieces, split.num_tokens, split.num_pairs)))
        table = np.concatenate(items, axis=1)
        table = table[:, np.lexsort((table[1], table[0]))]
        self._owner, self._piece, self.num_tokens, self.num_pairs = table
        if not len(self):
            raise DataError(
                f"every sample is longer than max_tokens = {max_tokens}; raise max_tokens"
            )

    def __len__(self) -> int:
        return self.num_tokens.size

    def __getitem__(self, index: int) -> PrefixTree:
        owner = int(self._owner[index])
        tree = self.trees[owner]
        split = self._splits.get(owner)
        if split is None:
            return tree
        if self._is_truncated:
            tree, _ = truncate_tree(tree, self.max_tokens)
        return replace(split, tree=tree).piece(int(self._piece[index]))

    def place(self, index: int) -> str:
        """Where item `index` comes from, for messages."""
        return _place(self.trees, int(self._owner[index]))

    def _cut(self, index: int, on_overflow: Overflow) -> Split:
        """How tree `index`, larger than the budget, is cut."""
        tree, place = self.trees[index], _place(self.trees, index)
        if tree.num_tokens <= self.max_tokens:
            raise AssertionError(f"{place} is smaller than its num_tokens says")
        if on_overflow == "error":
            raise DataError(
                f"{place}: must have at most max_tokens = {self.max_tokens} tokens, got "
                f"{tree.num_tokens}; raise max_tokens or use on_overflow='split'"
            )
        shortened, lost = tree, set[int]()
        if self._is_truncated:
            shortened, lost = truncate_tree(tree, self.max_tokens)
        split = split_tree(shortened, self.max_tokens, lost)
        too_long = [tree.leaves[leaf] for leaf in split.too_long]
        if too_long and on_overflow == "split":
            key = too_long[0].key
            # a rendered sample has the index of its message, which is not its number
            name = f"message {key}" if isinstance(key, int) else f"sample {key!r}"
            raise DataError(
                f"{place}, {name}: must have at most max_tokens = "
                f"{self.max_tokens} tokens, got {tree.sample_length(too_long[0])}; raise it or use "
                "on_overflow='truncate' or 'drop' (--on_overflow truncate)"
            )
        self.split.add(split)
        self.dropped.extend((place, leaf.key) for leaf in too_long)
        if self._is_truncated:
            kept = (leaf for i, leaf in enumerate(tree.leaves) if i not in split.too_long)
            cut = (leaf for leaf in kept if tree.sample_length(leaf) > self.max_tokens)
            self.truncated.extend((place, leaf.key) for leaf in cut)
            self.split.truncated_samples = len(self.truncated)
        ends = tuple(replace(leaf, weights=None) for leaf in shortened.leaves)
        self._splits[index] = replace(split, tree=PrefixTree(shortened.segments, ends))
        return split


def _place(trees: Any, index: int) -> str:
    return trees.place(index) if hasattr(trees, "place") else f"tree {index}"
