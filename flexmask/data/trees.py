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

    def place(self, index: int) -> str:
        """Where tree `index` comes from, such as "conversations.jsonl:17"."""
        return self.places[index]

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> PrefixTree:
        return self.trees[index]

    def take(self, indices: np.ndarray) -> TreeDataset:
        """The trees of these indices."""
        return TreeDataset([self.trees[i] for i in indices], [self.places[i] for i in indices])

    def summary(self) -> str:
        """What was read and what was left out, in one line."""
        return summarize(
            {
                "conversations": len(self.trees),
                "samples": sum(len(tree.leaves) for tree in self.trees),
                "tokens": sum(tree.num_tokens for tree in self.trees),
                "sample_tokens": sum(tree.num_sample_tokens for tree in self.trees),
                "bad_lines": len(self.bad_lines),
            }
        )


def summarize(counts: Mapping[str, int]) -> str:
    """What data hold and what was left out, in one line; a manifest has these counts too."""
    tokens, sample_tokens = counts["tokens"], counts["sample_tokens"]
    line = (
        f"{pluralize(counts['conversations'], 'conversation')}, "
        f"{pluralize(counts['samples'], 'sample')}, {tokens:,} tokens in a single pass "
        f"({sample_tokens:,} in N-pass, {sample_tokens / tokens:.2f} times as many)"
    )
    if counts["bad_lines"]:
        line += f"; {pluralize(counts['bad_lines'], 'bad line')} skipped"
    return line


def split_dataset(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """A random share of the trees of a dataset (at least one, never all), and the others."""
    if len(dataset) < 2:
        raise DataError("one conversation cannot be split; give the evaluation its own file")
    order = np.random.default_rng(seed).permutation(len(dataset))
    count = min(max(1, round(share * len(dataset))), len(dataset) - 1)
    return dataset.take(np.sort(order[:count])), dataset.take(np.sort(order[count:]))


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
