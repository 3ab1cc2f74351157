"""A file of conversations counted before it is trained on: tokens, pairs, tiles, losses.

Conversations go by one at a time. Nothing of one is kept but sums and, in four bytes each, how long
it and its samples are.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flexmask.data.file_formats import DataFile
from flexmask.data.files import BadLine, OnBadLine, read_files
from flexmask.data.renderer import Rendered, Renderer
from flexmask.model.windows import FULL, Window
from flexmask.model.work import (
    TILE,
    Work,
    npass_tiled,
    npass_work,
    single_pass_tiled,
    single_pass_work,
)
from flexmask.tools.plan.branches import count_branches, leaf_samples
from flexmask.tools.plan.mistraining import Mistraining, count_mistrained
from flexmask.tools.plan.row_budget import RowBudget

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


@dataclass(slots=True)
class Way:
    """What one way of training brings to a model.

    Attributes:
        work: tokens and visible pairs; packed N-pass has those of N-pass.
        tiled: the same with all pairs of the visited tiles of 128 x 128, each sequence or tree in a
            row of its own.
    """

    work: Work = field(default_factory=Work)
    tiled: Work = field(default_factory=Work)

    def add(self, work: Work, tiled: Work) -> None:
        """Count one conversation."""
        self.work, self.tiled = self.work.plus(work), self.tiled.plus(tiled)

    def num_tiles(self, window: Window = FULL) -> int:
        """Visited tiles of a layer."""
        return self.tiled.pairs(window) // TILE**2

    @property
    def tile_density(self) -> float:
        """Visible pairs for each pair in a visited tile."""
        return self.work.num_pairs / self.tiled.num_pairs


@dataclass(slots=True)
class Plan:
    """What is known of the conversations so far.

    Attributes:
        overflow: what a row budget would do, None without one.
        thinking: what the chat template does with the thinking of earlier turns.
        windows: windows and chunks of a model, for which pairs and tiles are counted too.
        conversations, samples, trained_tokens: how many; a sample is a trained assistant message.
        npass, one_render, single_pass: the ways; one render is the last sample of a conversation,
            its text up to the last trained token.
        leaves: ends of all trees that no sample goes on from; a chain has one.
        chains: conversations whose tree is a chain.
        branches: where the others come from, `leaves` less `conversations` of them.
        turns: samples in each conversation.
        conversation_tokens: tokens of each conversation's tree.
        sample_tokens: tokens of each sample.
        longest_npass, longest_render: most tokens of a conversation's samples, end to end, and of
            its last sample.
        mistrained: trained tokens that other pipelines get wrong.
        empty_thoughts: samples that train an empty thought.
        unused_keys: how many conversations have each key that nothing is made of.
        num_bad_lines: lines that were skipped.
        bad_lines: the first of them.
    """

    overflow: RowBudget | None = None
    thinking: str = ""
    windows: tuple[Window, ...] = ()
    conversations: int = 0
    samples: int = 0
    trained_tokens: int = 0
    npass: Way = field(default_factory=Way)
    one_render: Way = field(default_factory=Way)
    single_pass: Way = field(default_factory=Way)
    leaves: int = 0
    chains: int = 0
    branches: Counter[str] = field(default_factory=Counter)
    turns: array[int] = field(default_factory=lambda: array("i"))
    conversation_tokens: array[int] = field(default_factory=lambda: array("i"))
    sample_tokens: array[int] = field(default_factory=lambda: array("i"))
    longest_npass: int = 0
    longest_render: int = 0
    mistrained: Mistraining = field(default_factory=Mistraining)
    unused_keys: Counter[str] = field(default_factory=Counter)
    empty_thoughts: int = 0
    num_bad_lines: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)

    def add(self, rendered: Rendered, renderer: Renderer) -> None:
        """Count what `renderer` made of one conversation."""
        conversation = rendered.conversation
        samples, tree = rendered.samples, rendered.tree
        self.empty_thoughts += rendered.num_empty_thoughts
        self.conversations += 1
        self.samples += len(samples)
        self.trained_tokens += sum(sample.num_trained for sample in samples)
        lengths = list(map(len, samples))
        windows = self.windows
        for way, rows in ((self.npass, lengths), (self.one_render, lengths[-1:])):
            way.add(npass_work(rows, windows), npass_tiled(rows, windows))
        self.single_pass.add(single_pass_work(tree, windows), single_pass_tiled(tree, windows))
        self.turns.append(len(samples))
        self.conversation_tokens.append(tree.num_tokens)
        self.sample_tokens.extend(lengths)
        self.longest_npass = max(self.longest_npass, sum(lengths))
        self.longest_render = max(self.longest_render, lengths[-1])
        leaves = leaf_samples(tree)
        self.leaves += len(leaves)
        self.chains += len(leaves) == 1
        template = renderer.template(conversation)
        self.branches += count_branches(conversation, [samples[i] for i in leaves], template)
        self.unused_keys.update(rendered.unused_keys)
        self.mistrained.add(count_mistrained(conversation, samples, renderer.tokenizer))
        if self.overflow is not None:
            self.overflow.add(tree, samples)

    def skip(self, bad: BadLine) -> None:
        """Count a bad line."""
        self.num_bad_lines += 1
        if len(self.bad_lines) < _LISTED:
            self.bad_lines.append(BadLine(bad.line, bad.reason))

    @property
    def token_ratio(self) -> float:
        """Tokens of N-pass for each token of the single pass."""
        return self.npass.work.num_tokens / self.single_pass.work.num_tokens

    @property
    def largest(self) -> dict[str, int]:
        """The most tokens that one conversation brings into one row, by way of training."""
        return {
            "npass": max(self.sample_tokens),
            "packed_npass": self.longest_npass,
            "one_render": self.longest_render,
            "single_pass": max(self.conversation_tokens),
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; the names are documented in docs/cli.md."""
        return {
            "thinking": self.thinking,
            "conversations": self.conversations,
            "samples": self.samples,
            "trained_tokens": self.trained_tokens,
            "npass_tokens": self.npass.work.num_tokens,
            "one_render_tokens": self.one_render.work.num_tokens,
            "single_pass_tokens": self.single_pass.work.num_tokens,
            "token_ratio": self.token_ratio,
            "npass_visible_pairs": self.npass.work.num_pairs,
            "one_render_visible_pairs": self.one_render.work.num_pairs,
            "single_pass_visible_pairs": self.single_pass.work.num_pairs,
            "npass_tile_density": self.npass.tile_density,
            "tile_density": self.single_pass.tile_density,
            "leaves": self.leaves,
            "chains": self.chains,
            "branches": self.branches,
            "largest_row_tokens": self.largest,
            "turns": distribution(self.turns),
            "conversation_tokens": distribution(self.conversation_tokens),
            "sample_tokens": distribution(self.sample_tokens),
            "mistrained_tokens": asdict(self.mistrained),
            "empty_thoughts": self.empty_thoughts,
            "overflow": self.overflow and self.overflow.to_json(),
            "unused_keys": self.unused_keys,
            "num_bad_lines": self.num_bad_lines,
            "bad_lines": [{"line": bad.line, "reason": bad.reason} for bad in self.bad_lines],
        }


def make_plan(
    paths: Iterable[DataFile],
    renderer: Renderer,
    *,
    max_tokens: int | None = None,
    on_bad_line: OnBadLine = "error",
    windows: Iterable[Window] = (),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Plan:
    """The plan for the conversations of some files.

    Args:
        paths: the files.
        renderer: renders the conversations.
        max_tokens: budget of a row, at least 1, or None.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" counts it.
        windows: windows and chunks of a model, to count their pairs.
        progress: wraps the iteration over lines, such as `tqdm.tqdm`.

    Raises:
        DataError, TemplateError: the file or a line of it cannot be used; the message names it.
    """
    budget = None if max_tokens is None else RowBudget(max_tokens)
    plan = Plan(budget, renderer.thinking_text, tuple(windows))

    columns = renderer.data_columns
    items = read_files(paths, renderer.render, on_bad_line=on_bad_line, columns=columns)
    for item in progress(items):
        if isinstance(item, BadLine):
            plan.skip(item)
        else:
            plan.add(item, renderer)
    return plan
