"""What is done with a tree larger than the budget, the same wherever trees meet one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from flexmask.errors import DataError, pluralize
from flexmask.packing.split import Split, split_tree
from flexmask.tree.tree import PrefixTree

Overflow = Literal["split", "drop", "error"]


@dataclass(slots=True)
class SplitCount:
    """What cutting came to.

    Attributes:
        trees: how many were larger than the budget.
        pieces: into how many they were cut.
        repeated_tokens: history that pieces compute again.
        dropped_samples: samples longer than the budget by themselves.
        lost_trees: trees of which no sample is left.
    """

    trees: int = 0
    pieces: int = 0
    repeated_tokens: int = 0
    dropped_samples: int = 0
    lost_trees: int = 0

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
        if self.dropped_samples:
            line += f"; {pluralize(self.dropped_samples, 'sample')} dropped, longer than the budget"
        if self.lost_trees:
            line += (
                f", and with {'it' if self.dropped_samples == 1 else 'them'} "
                f"{pluralize(self.lost_trees, 'whole conversation')}"
            )
        return line


def check_budget(max_tokens: int | None, on_overflow: Overflow) -> None:
    """Raise DataError for a budget below 1 or an unknown policy."""
    if on_overflow not in get_args(Overflow):
        raise DataError(f"on_overflow must be one of {get_args(Overflow)}, got {on_overflow!r}")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens must be at least 1, got {max_tokens}")


def split_overflow(
    tree: PrefixTree, max_tokens: int, on_overflow: Overflow, where: str
) -> Split | None:
    """How a tree is cut, or None where it fits the budget as it is.

    Args:
        tree: the tree.
        max_tokens: the budget, in tokens.
        on_overflow: "split": cut it into several trees, each with the history that its samples
            need, no token trained twice; "drop": the same, and leave out samples that are longer
            than the budget by themselves; "error": raise.
        where: what the tree is called in an error.

    Raises:
        DataError: it does not fit and may not be split, or a sample does not and may not be left
            out.
    """
    if tree.num_tokens <= max_tokens:
        return None
    if on_overflow == "error":
        raise DataError(
            f"{where}: must have at most max_tokens = {max_tokens} tokens, got {tree.num_tokens}; "
            "raise max_tokens or use on_overflow='split'"
        )
    split = split_tree(tree, max_tokens)
    if split.too_long and on_overflow == "split":
        leaf = tree.leaves[split.too_long[0]]
        raise DataError(
            f"{where}, sample {leaf.key!r}: must have at most max_tokens = {max_tokens} tokens, "
            f"got {tree.sample_length(leaf)}; raise it or use on_overflow='drop' "
            "(--on_overflow drop)"
        )
    return split
