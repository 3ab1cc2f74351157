"""What a budget for rows would do to the conversations of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flexmask.packing.overflow import SplitCount
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
        tokens: of the single pass over what is left, repeated history counted.
        npass_tokens: of N-pass over the same samples.
    """

    max_tokens: int
    split: SplitCount = field(default_factory=SplitCount)
    dropped_trained_tokens: int = 0
    tokens: int = 0
    npass_tokens: int = 0

    def add(self, tree: PrefixTree, samples: Sequence[Sample]) -> None:
        """Count one conversation."""
        if tree.num_tokens <= self.max_tokens:
            self.tokens += tree.num_tokens
            self.npass_tokens += tree.num_sample_tokens
            return
        split = split_tree(tree, self.max_tokens)
        self.split.add(split)
        trained = {sample.key: sample.num_trained for sample in samples}
        self.dropped_trained_tokens += sum(trained[tree.leaves[i].key] for i in split.too_long)
        self.tokens += sum(split.num_tokens)
        kept = (tree.leaves[index] for group in split.groups for index in group)
        self.npass_tokens += sum(map(tree.sample_length, kept))

    @property
    def fewest_rows(self) -> int:
        """A number of rows that no packing of what is left is below."""
        return -(-self.tokens // self.max_tokens)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self) | {"fewest_rows": self.fewest_rows}
