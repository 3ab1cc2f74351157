"""What a budget for rows would do to the conversations of a plan."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flexmask.packing.fill import fewest_rows
from flexmask.packing.fitting import SplitCount
from flexmask.packing.split import split_tree
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree


@dataclass(slots=True)
class RowBudget:
    """What becomes of conversations under a budget.

    Attributes:
        max_tokens: the budget.
        split: what cutting those comes to that are larger. Samples that are too long by themselves
            count as dropped: `--on_overflow drop` leaves them out, `split` refuses them.
        dropped_trained_tokens: trained tokens in those.
        truncated_trained_tokens: how many of them `--on_overflow truncate` keeps.
        npass_tokens: of N-pass over what is left.
        sizes: tokens of each tree and each piece that is left.
    """

    max_tokens: int
    split: SplitCount = field(default_factory=SplitCount)
    dropped_trained_tokens: int = 0
    truncated_trained_tokens: int = 0
    npass_tokens: int = 0
    sizes: array[int] = field(default_factory=lambda: array("i"))

    def add(self, tree: PrefixTree, samples: Sequence[Sample]) -> None:
        """Count one conversation."""
        if tree.num_tokens <= self.max_tokens:
            self.sizes.append(tree.num_tokens)
            self.npass_tokens += tree.num_sample_tokens
            return
        split = split_tree(tree, self.max_tokens)
        self.split.add(split)
        self.sizes.extend(split.num_tokens)
        for sample in samples:
            if len(sample) <= self.max_tokens:
                self.npass_tokens += len(sample)
            else:
                self.dropped_trained_tokens += sample.num_trained
                kept = sample.loss_weights[1 : self.max_tokens]
                self.truncated_trained_tokens += int(np.count_nonzero(kept))

    @property
    def tokens(self) -> int:
        """Of the single pass over what is left, repeated history counted."""
        return sum(self.sizes)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data; no packing has fewer than `fewest_rows`, that of `train`."""
        return {
            "max_tokens": self.max_tokens,
            "split": asdict(self.split),
            "dropped_trained_tokens": self.dropped_trained_tokens,
            "truncated_trained_tokens": self.truncated_trained_tokens,
            "tokens": self.tokens,
            "npass_tokens": self.npass_tokens,
            "fewest_rows": fewest_rows(np.array(self.sizes, np.int64), self.max_tokens),
        }
