"""A file of conversations, read and merged into trees, with a count of what was left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexmask.collator import TreeCollator
from flexmask.data_files import BadLine, read_conversations
from flexmask.errors import DataError, FlexmaskError
from flexmask.packing import Overflow
from flexmask.splitting import split_tree
from flexmask.tree import PrefixTree


@dataclass(slots=True)
class TreeDataset:
    """One prefix tree per conversation, and what was not used.

    Attributes:
        trees: the trees, in the order of the file; what a data loader iterates over.
        bad_lines: lines skipped because they could not be read or rendered.
        dropped: (place, sample key) of samples longer than the budget.
    """

    trees: list[PrefixTree] = field(default_factory=list)
    bad_lines: list[BadLine] = field(default_factory=list)
    dropped: list[tuple[str | None, Hashable]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> PrefixTree:
        return self.trees[index]

    def split(self, share: float, seed: int) -> tuple[TreeDataset, TreeDataset]:
        """A random share of the trees (at least one, never all), and the others."""
        first, rest = random_share(len(self), share, seed)
        return (
            TreeDataset([self.trees[index] for index in first]),
            TreeDataset([self.trees[index] for index in rest]),
        )

    def summary(self) -> str:
        """What was read and what was left out, in one line."""
        samples = sum(len(tree.leaves) for tree in self.trees)
        single = sum(tree.num_tokens for tree in self.trees)
        npass = sum(tree.num_sample_tokens for tree in self.trees)
        line = (
            f"{len(self.trees):,} conversations, {samples:,} samples, {single:,} tokens in a "
            f"single pass ({npass:,} in N-pass, {npass / single:.2f} times as many)"
        )
        if self.bad_lines:
            line += f"; {len(self.bad_lines):,} bad lines skipped"
        if self.dropped:
            line += f"; {len(self.dropped):,} samples dropped, longer than the budget"
        return line


def random_share(num_trees: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, in order, of a random share of the trees (at least one, never all), and the rest."""
    if num_trees < 2:
        raise DataError("one conversation cannot be split; give the evaluation its own file")
    order = np.random.default_rng(seed).permutation(num_trees)
    count = min(max(1, round(share * num_trees)), num_trees - 1)
    return np.sort(order[:count]), np.sort(order[count:])


def load_trees(
    path: str | os.PathLike[str],
    collator: TreeCollator,
    *,
    on_bad_line: str = "error",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TreeDataset:
    """The trees of a JSON Lines file, rendered and weighted as `collator` says.

    Args:
        path: a file with one conversation a line.
        collator: its tokenizer, weighting, budget and overflow policy are used.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" lists it.
        progress: wraps the iteration over conversations, such as `tqdm.tqdm`.

    Raises:
        DataError, TemplateError: the file or a line of it cannot be used; the message names it.
    """
    file = read_conversations(path, on_bad_line=on_bad_line)
    dataset = TreeDataset()
    unrendered: list[BadLine] = []
    for conversation in progress(file):
        try:
            tree = collator.tree(conversation)
        except FlexmaskError as error:
            if on_bad_line == "error":
                raise
            unrendered.append(BadLine(conversation.line, str(error)))
            continue
        _add(dataset, tree, conversation.where, collator.max_tokens, collator.on_overflow)
    dataset.bad_lines = sorted([*file.bad_lines, *unrendered], key=lambda bad: bad.line)
    if not dataset.trees:
        reason = dataset.bad_lines[0].reason if dataset.bad_lines else "all samples are too long"
        raise DataError(f"{path}: no conversation can be used; the first: {reason}")
    return dataset


def _add(
    dataset: TreeDataset,
    tree: PrefixTree,
    where: str | None,
    max_tokens: int | None,
    on_overflow: Overflow,
) -> None:
    """Add `tree` if a sample of it fits the budget; the collator does the splitting itself."""
    if max_tokens is None or tree.num_tokens <= max_tokens:
        dataset.trees.append(tree)
        return
    if on_overflow == "error":
        raise DataError(
            f"{where}: must have at most max_tokens = {max_tokens} tokens, got {tree.num_tokens}; "
            "raise max_tokens or split"
        )
    pieces, too_long = split_tree(tree, max_tokens)
    if too_long and on_overflow == "split":
        raise DataError(
            f"{where}: the sample of message {too_long[0].key} must have at most max_tokens = "
            f"{max_tokens} tokens, got {tree.sample_length(too_long[0])}; "
            "raise max_tokens or drop such samples"
        )
    if pieces:
        dataset.trees.append(tree)
    dataset.dropped.extend((where, leaf.key) for leaf in too_long)
