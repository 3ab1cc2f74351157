"""A file of conversations, read and merged into trees, with a count of what was left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexmask.data.files import BadLine, read_conversations
from flexmask.data.messages import Conversation, pluralize
from flexmask.errors import DataError, FlexmaskError
from flexmask.tree.tree import PrefixTree


@dataclass(slots=True)
class TreeDataset:
    """One prefix tree per conversation, and what was not used.

    Attributes:
        trees: the trees, in the order of the file; what a data loader iterates over.
        places: where each comes from, for messages.
        bad_lines: lines skipped because they could not be read or rendered.
    """

    trees: list[PrefixTree] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad_lines: list[BadLine] = field(default_factory=list)

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each tree, int64 [n]."""
        return np.fromiter((tree.num_tokens for tree in self.trees), np.int64, len(self))

    @property
    def num_pairs(self) -> np.ndarray:
        """Visible pairs (q, k) of each tree, int64 [n]."""
        return np.fromiter((tree.num_pairs for tree in self.trees), np.int64, len(self))

    def place(self, index: int) -> str:
        """Where tree `index` comes from, such as "conversations.jsonl:17"."""
        return self.places[index]

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> PrefixTree:
        return self.trees[index]

    def split(self, share: float, seed: int) -> tuple[TreeDataset, TreeDataset]:
        """A random share of the trees (at least one, never all), and the others."""
        first, rest = random_share(len(self), share, seed)
        return self._part(first), self._part(rest)

    @classmethod
    def joined(cls, parts: Iterable[TreeDataset]) -> TreeDataset:
        """The trees of several files, one file after the other."""
        whole = cls()
        for part in parts:
            whole.trees += part.trees
            whole.places += part.places
            whole.bad_lines += part.bad_lines
        return whole

    def _part(self, indices: np.ndarray) -> TreeDataset:
        return TreeDataset([self.trees[i] for i in indices], [self.places[i] for i in indices])

    def summary(self) -> str:
        """What was read and what was left out, in one line."""
        samples = sum(len(tree.leaves) for tree in self.trees)
        single = sum(tree.num_tokens for tree in self.trees)
        npass = sum(tree.num_sample_tokens for tree in self.trees)
        line = (
            f"{pluralize(len(self.trees), 'conversation')}, {pluralize(samples, 'sample')}, "
            f"{single:,} tokens in a single pass ({npass:,} in N-pass, "
            f"{npass / single:.2f} times as many)"
        )
        if self.bad_lines:
            line += f"; {pluralize(len(self.bad_lines), 'bad line')} skipped"
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
    make_tree: Callable[[Conversation], PrefixTree],
    *,
    on_bad_line: str = "error",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TreeDataset:
    """The trees of a JSON Lines file, as `make_tree` renders and weighs them.

    Args:
        path: a file with one conversation a line.
        make_tree: the tree of a conversation, such as `TreeCollator.tree`.
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
            tree = make_tree(conversation)
        except FlexmaskError as error:
            if on_bad_line == "error":
                raise
            unrendered.append(BadLine(conversation.line, str(error)))
            continue
        dataset.trees.append(tree)
        dataset.places.append(conversation.where or f"conversation {len(dataset)}")
    dataset.bad_lines = sorted([*file.bad_lines, *unrendered], key=lambda bad: bad.line)
    if not dataset.trees:
        reason = dataset.bad_lines[0].reason
        raise DataError(f"{path}: no conversation can be used; the first: {reason}")
    return dataset
