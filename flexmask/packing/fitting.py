"""Trees that all fit a budget, on top of any indexable collection of trees.

What is larger is cut up front, so that whatever comes after (sampler, collator, model) meets only
trees that fit. Sizes are known without tokens: a tree is read here only if it is too large.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from flexmask.errors import DataError
from flexmask.packing.overflow import Overflow, SplitCount, check_budget, split_overflow
from flexmask.packing.split import Split
from flexmask.tree.tree import PrefixTree


def sizes_of(trees: Any) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, visible pairs) of each tree, both int64 [n].

    Args:
        trees: what has `num_tokens` and `num_pairs` as arrays, such as `TreeDataset`, or a sequence
            of PrefixTrees.

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
        dropped: (place, sample key) of the samples longer than the budget.
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
        self._splits: dict[int, Split] = {}
        tokens, pairs = sizes_of(trees)
        items = [np.stack((np.arange(len(tokens)), np.zeros_like(tokens), tokens, pairs))]
        items[0] = items[0][:, tokens <= max_tokens]
        for index in np.flatnonzero(tokens > max_tokens).tolist():
            items.append(self._cut(index, on_overflow))
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
        return tree if split is None else replace(split, tree=tree).piece(int(self._piece[index]))

    def place(self, index: int) -> str:
        """Where item `index` comes from, for messages."""
        return _place(self.trees, int(self._owner[index]))

    def _cut(self, index: int, on_overflow: Overflow) -> np.ndarray:
        """Cut tree `index`; returns its pieces as int64 [4, pieces], see `__init__`."""
        tree = self.trees[index]
        place = _place(self.trees, index)
        split = split_overflow(tree, self.max_tokens, on_overflow, place)
        if split is None:
            raise AssertionError(f"{place} is smaller than its num_tokens says")
        self.split.add(split)
        self.dropped.extend((place, tree.leaves[leaf].key) for leaf in split.too_long)
        self._splits[index] = replace(split, tree=PrefixTree(tree.segments, tree.leaves))
        numbers = range(len(split))
        return np.array(
            [[index] * len(split), numbers, split.num_tokens, split.num_pairs], np.int64
        )


def _place(trees: Any, index: int) -> str:
    return trees.place(index) if hasattr(trees, "place") else f"tree {index}"
