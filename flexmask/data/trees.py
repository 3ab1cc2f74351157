"""Files of conversations read into memory, as trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexmask.data.file_formats import DataFile
from flexmask.data.files import BadLine, OnBadLine, Ranks, read_files
from flexmask.data.messages import Conversation
from flexmask.data.renderer import Renderer
from flexmask.errors import DataError, pluralize
from flexmask.tree.tree import PrefixTree


@dataclass(slots=True)
class TreeDataset:
    """One prefix tree per conversation, and what was not used.

    Attributes:
        trees: the trees, in the order of the file; what a data loader iterates over.
        places: where each comes from, for messages.
        bad_lines: lines skipped because they could not be read or rendered, or as asked for.
        empty_thoughts: samples that train an empty thought.
        greetings: conversations that begin with a message of the assistant, which is context.
        unused_keys: how many conversations have each key that nothing is made of.
        weights: as in `repeat_by_weight`.
    """

    trees: list[PrefixTree] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad_lines: list[BadLine] = field(default_factory=list)
    empty_thoughts: int = 0
    greetings: int = 0
    unused_keys: Counter[str] = field(default_factory=Counter)
    weights: Mapping[str, float] = field(default_factory=dict)

    def place(self, index: int) -> str:
        """Where tree `index` comes from, such as "conversations.jsonl:17"."""
        return self.places[index]

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> PrefixTree:
        return self.trees[index]

    def take(self, indices: np.ndarray) -> TreeDataset:
        """The trees of these indices."""
        trees, places = [self.trees[i] for i in indices], [self.places[i] for i in indices]
        return TreeDataset(trees, places, weights=self.weights)

    def summary(self) -> str:
        """What was read and what was left out, in one line."""
        return summarize(
            {
                "conversations": len(self.trees),
                "samples": sum(len(tree.leaves) for tree in self.trees),
                "tokens": sum(tree.num_tokens for tree in self.trees),
                "sample_tokens": sum(tree.num_sample_tokens for tree in self.trees),
                "empty_thoughts": self.empty_thoughts,
                "greetings": self.greetings,
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
    if counts["empty_thoughts"]:
        line += f"; {empty_thoughts(counts['empty_thoughts'])}"
    if counts["greetings"]:
        line += f"; {pluralize(counts['greetings'], 'greeting')} of the assistant, context alone"
    if counts["bad_lines"]:
        line += f"; {pluralize(counts['bad_lines'], 'bad line')} skipped"
    return line


def empty_thoughts(count: int) -> str:
    """What is said of so many samples that train an empty thought."""
    return (
        f"{pluralize(count, 'sample')} without thinking, for which the chat template writes an "
        "empty thought, and it is trained (--empty_thinking skip_conversation leaves such "
        "conversations out)"
    )


def split_dataset(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """A random share of the trees of a dataset (at least one, never all), and the others."""
    if len(dataset) < 2:
        raise DataError("one conversation cannot be split; give the evaluation its own file")
    order = np.random.default_rng(seed).permutation(len(dataset))
    count = min(max(1, round(share * len(dataset))), len(dataset) - 1)
    return dataset.take(np.sort(order[:count])), dataset.take(np.sort(order[count:]))


def repeat_by_weight(dataset: Any, seed: int) -> Any:
    """The trees of a dataset as often as an epoch trains them.

    `dataset.weights` has by the name of a file how often that is; 1 where it is not named. Of a
    fraction it is a random share of the file, at least one tree, the same in every epoch.
    """
    if {*dataset.weights.values()} <= {1}:
        return dataset
    by_file: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        by_file.setdefault(dataset.place(index).rpartition(":")[0], []).append(index)
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for file, indices in by_file.items():
        times, fraction = divmod(dataset.weights.get(file, 1), 1)
        count = max(1, round(fraction * len(indices))) if fraction else 0
        chosen += indices * int(times) + generator.permutation(indices)[:count].tolist()
    return dataset.take(np.sort(chosen))


def load_trees(
    paths: Iterable[DataFile],
    renderer: Renderer,
    *,
    on_bad_line: OnBadLine = "error",
    ranks: Ranks | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TreeDataset:
    """The trees of files, one for each conversation.

    Args:
        paths: the files and splits; where it maps them to weights, the trees have these.
        renderer: renders the conversations.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" lists it.
        ranks: processes that render a share each and all get all trees.
        progress: wraps the iteration over lines, such as `tqdm.tqdm`.

    Raises:
        DataError, TemplateError: a file or a line of it cannot be used; the message names it.
    """
    dataset = TreeDataset()
    if isinstance(paths, Mapping):
        dataset.weights = {str(file): weight for file, weight in paths.items()}

    def use(conversation: Conversation) -> tuple[str, PrefixTree, int, bool, tuple[str, ...]]:
        found = renderer.render(conversation)
        counts = found.num_empty_thoughts, conversation.has_greeting, found.unused_keys
        return conversation.where or "", found.tree, *counts

    columns = renderer.data_columns
    items = read_files(paths, use, on_bad_line=on_bad_line, ranks=ranks, columns=columns)
    for item in progress(items):
        if isinstance(item, BadLine):
            dataset.bad_lines.append(item)
        else:
            dataset.places.append(item[0])
            dataset.trees.append(item[1])
            dataset.empty_thoughts += item[2]
            dataset.greetings += item[3]
            dataset.unused_keys.update(item[4])
    return dataset
