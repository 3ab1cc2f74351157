"""A file of conversations counted before it is trained on: tokens, pairs, tiles, losses.

Conversations go by one at a time. Nothing of one is kept but sums and, in four bytes each, how long
it and its samples are.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexmask.data.files import BadLine, OnBadLine, read_files
from flexmask.data.messages import Conversation
from flexmask.data.trees import Renderer
from flexmask.errors import DataError
from flexmask.model.windows import Window
from flexmask.model.work import (
    TILE,
    Work,
    npass_tiled,
    npass_work,
    single_pass_tiled,
    single_pass_work,
)
from flexmask.tools.plan.mistraining import Mistraining, count_mistrained
from flexmask.tools.plan.row_budget import RowBudget
from flexmask.tree.sample import Sample
from flexmask.tree.tree import build_tree

_LISTED = 20  # bad lines that are kept to be shown
_NUM_BINS = 64  # of a distribution, at most


def distribution(values: Sequence[int]) -> dict[str, Any]:
    """The mean, quantiles and histogram of whole numbers, at least one, as plain data.

    `bins` are (first number, one past the last, count), of equal width, without empty ones.
    """
    lowest, highest = min(values), max(values)
    width = -(-(highest + 1 - lowest) // _NUM_BINS)
    counts, edges = np.histogram(values, np.arange(lowest, highest + 1 + width, width))
    median, p95 = np.quantile(values, (0.5, 0.95), method="inverted_cdf").tolist()
    return {
        "mean": float(np.mean(values)),
        "lowest": lowest,
        "median": median,
        "p95": p95,
        "highest": highest,
        "bins": [
            [start, start + width, count]
            for start, count in zip(edges.tolist(), counts.tolist(), strict=False)
            if count
        ],
    }


def _lengths() -> array[int]:
    return array("i")


@dataclass(slots=True)
class Plan:
    """What is known of the conversations so far.

    Attributes:
        overflow: what a row budget would do, None without one.
        windows: windows and chunks of a model, for which pairs and tiles are counted too.
        conversations, samples, trained_tokens: how many; a sample is a trained assistant message.
        npass, single_pass: tokens and visible pairs; packed N-pass has those of N-pass.
        npass_tiled, single_pass_tiled: the same with all pairs of the visited tiles of 128 x 128,
            each sequence or tree in a row of its own.
        turns: samples in each conversation.
        conversation_tokens: tokens of each conversation's tree.
        sample_tokens: tokens of each sample.
        longest_npass: most tokens of a conversation's samples, end to end.
        mistrained: trained tokens that other pipelines get wrong.
        num_bad_lines: lines that were skipped.
        bad_lines: the first of them, as (line, reason).
    """

    overflow: RowBudget | None = None
    windows: tuple[Window, ...] = ()
    conversations: int = 0
    samples: int = 0
    trained_tokens: int = 0
    npass: Work = field(default_factory=Work)
    single_pass: Work = field(default_factory=Work)
    npass_tiled: Work = field(default_factory=Work)
    single_pass_tiled: Work = field(default_factory=Work)
    turns: array[int] = field(default_factory=_lengths)
    conversation_tokens: array[int] = field(default_factory=_lengths)
    sample_tokens: array[int] = field(default_factory=_lengths)
    longest_npass: int = 0
    mistrained: Mistraining = field(default_factory=Mistraining)
    num_bad_lines: int = 0
    bad_lines: list[tuple[int, str]] = field(default_factory=list)

    def add(self, conversation: Conversation, samples: Sequence[Sample], tokenizer: Any) -> None:
        """Count one conversation and its samples."""
        tree = build_tree(samples)
        self.conversations += 1
        self.samples += len(samples)
        self.trained_tokens += sum(sample.num_trained for sample in samples)
        lengths = list(map(len, samples))
        self.npass = self.npass.plus(npass_work(lengths, self.windows))
        self.npass_tiled = self.npass_tiled.plus(npass_tiled(lengths, self.windows))
        self.single_pass = self.single_pass.plus(single_pass_work(tree, self.windows))
        tiled = single_pass_tiled(tree, self.windows)
        self.single_pass_tiled = self.single_pass_tiled.plus(tiled)
        self.turns.append(len(samples))
        self.conversation_tokens.append(tree.num_tokens)
        self.sample_tokens.extend(lengths)
        self.longest_npass = max(self.longest_npass, sum(lengths))
        self.mistrained.add(count_mistrained(conversation, samples, tokenizer))
        if self.overflow is not None:
            self.overflow.add(tree, samples)

    def skip(self, line: int, reason: str) -> None:
        """Count a bad line."""
        self.num_bad_lines += 1
        if len(self.bad_lines) < _LISTED:
            self.bad_lines.append((line, reason))

    @property
    def token_ratio(self) -> float:
        """Tokens of N-pass for each token of the single pass."""
        return self.npass.num_tokens / self.single_pass.num_tokens

    @property
    def largest(self) -> dict[str, int]:
        """The most tokens that one conversation brings into one row, by way of training."""
        return {
            "npass": max(self.sample_tokens),
            "packed_npass": self.longest_npass,
            "single_pass": max(self.conversation_tokens),
        }

    @property
    def tile_density(self) -> float:
        """Visible pairs for each pair in a visited tile, in the single pass."""
        return self.single_pass.num_pairs / self.single_pass_tiled.num_pairs

    @property
    def npass_tile_density(self) -> float:
        """The same in N-pass."""
        return self.npass.num_pairs / self.npass_tiled.num_pairs

    @property
    def single_pass_tiles(self) -> int:
        """Visited tiles of the single pass."""
        return self.single_pass_tiled.num_pairs // TILE**2

    @property
    def npass_tiles(self) -> int:
        """Visited tiles of N-pass."""
        return self.npass_tiled.num_pairs // TILE**2

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; the names are documented in docs/cli.md."""
        return {
            "conversations": self.conversations,
            "samples": self.samples,
            "trained_tokens": self.trained_tokens,
            "npass_tokens": self.npass.num_tokens,
            "single_pass_tokens": self.single_pass.num_tokens,
            "token_ratio": self.token_ratio,
            "npass_visible_pairs": self.npass.num_pairs,
            "single_pass_visible_pairs": self.single_pass.num_pairs,
            "npass_tile_density": self.npass_tile_density,
            "tile_density": self.tile_density,
            "largest_row_tokens": self.largest,
            "turns": distribution(self.turns),
            "conversation_tokens": distribution(self.conversation_tokens),
            "sample_tokens": distribution(self.sample_tokens),
            "mistrained_tokens": asdict(self.mistrained),
            "overflow": self.overflow and self.overflow.to_json(),
            "num_bad_lines": self.num_bad_lines,
            "bad_lines": [{"line": line, "reason": reason} for line, reason in self.bad_lines],
        }


def make_plan(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    on_bad_line: OnBadLine = "error",
    windows: Iterable[Window] = (),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    watch: Callable[[Sequence[Sample]], None] | None = None,
) -> Plan:
    """The plan for the conversations of one or several files.

    Args:
        data: the file, or files.
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_tokens: budget of a row, or None.
        chat_template_kwargs: settings for the template.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" counts it.
        windows: windows and chunks of a model, to count their pairs.
        progress: wraps the iteration over lines, such as `tqdm.tqdm`.
        watch: given the samples of each conversation as it goes by.

    Raises:
        DataError, TemplateError: the file or a line of it cannot be used; the message names it.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")
    paths = [data] if isinstance(data, (str, os.PathLike)) else data
    plan = Plan(None if max_tokens is None else RowBudget(max_tokens), tuple(windows))
    renderer = Renderer(tokenizer, chat_template_kwargs=chat_template_kwargs)

    def use(conversation: Conversation) -> tuple[Conversation, list[Sample]]:
        return conversation, renderer.samples(conversation)

    for item in progress(read_files(map(Path, paths), use, on_bad_line=on_bad_line)):
        if isinstance(item, BadLine):
            plan.skip(item.line, item.reason)
            continue
        conversation, samples = item
        plan.add(conversation, samples, tokenizer)
        if watch is not None:
            watch(samples)
    return plan
