"""Conversations rendered, weighed and merged into trees; files of them read into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexmask.data.files import BadLine, OnBadLine, Ranks, read_files
from flexmask.data.messages import Conversation
from flexmask.data.samples import Weighting, check_weighting, render_samples, weigh_samples
from flexmask.errors import DataError, pluralize
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree, build_tree


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders conversations, all in the same way.

    Attributes:
        tokenizer: a Hugging Face tokenizer with a chat template.
        weighting: as in `weigh_samples`.
        chat_template_kwargs: settings for the chat template, such as {"enable_thinking": True}.
    """

    tokenizer: Any
    weighting: Weighting = "token"
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_weighting(self.weighting)

    def samples(self, conversation: Any) -> list[Sample]:
        """The weighted samples of a conversation, in any format of `parse_conversation`."""
        samples = render_samples(
            conversation, self.tokenizer, chat_template_kwargs=self.chat_template_kwargs
        )
        return weigh_samples(samples, self.weighting)

    def tree(self, conversation: Any) -> PrefixTree:
        """The prefix tree of these samples."""
        return build_tree(self.samples(conversation))


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
    paths: Iterable[Path],
    make_tree: Callable[[Conversation], PrefixTree],
    *,
    on_bad_line: OnBadLine = "error",
    ranks: Ranks | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TreeDataset:
    """The trees of files, one for each conversation, as `make_tree` renders and weighs them.

    Args:
        paths: the files.
        make_tree: the tree of a conversation, such as `Renderer.tree` and `TreeCollator.tree`.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" lists it.
        ranks: processes that render a share each and all get all trees.
        progress: wraps the iteration over lines, such as `tqdm.tqdm`.

    Raises:
        DataError, TemplateError: a file or a line of it cannot be used; the message names it.
    """
    dataset = TreeDataset()

    def use(conversation: Conversation) -> tuple[str, PrefixTree]:
        return conversation.where or "", make_tree(conversation)

    for item in progress(read_files(paths, use, on_bad_line=on_bad_line, ranks=ranks)):
        if isinstance(item, BadLine):
            dataset.bad_lines.append(item)
        else:
            dataset.places.append(item[0])
            dataset.trees.append(item[1])
    return dataset
