"""One epoch as the steps of data-parallel processes, and how full and how equal they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexmask.errors import pluralize


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one epoch for P processes.

    Attributes:
        batches: trees of each batch, row after row; batch s * P + p is that of process p in step s.
        rows: rows of each batch, int64 [steps, P]; 0 where a process has nothing but padding.
        tokens: tokens of each batch, int64 [steps, P].
        costs: predicted cost of each batch, in tokens, float64 [steps, P].
        max_tokens: budget of a row.
        fewest_rows: a number of rows that no packing is below.
    """

    batches: list[list[int]]
    rows: np.ndarray
    tokens: np.ndarray
    costs: np.ndarray
    max_tokens: int
    fewest_rows: int

    @property
    def num_rows(self) -> int:
        """Rows of all batches."""
        return int(self.rows.sum())

    @property
    def num_steps(self) -> int:
        """Batches that each process has."""
        return self.rows.shape[0]

    @property
    def num_empty(self) -> int:
        """Batches that hold no tree: padding, which trains nothing."""
        return int((self.rows == 0).sum())

    @property
    def fill(self) -> float:
        """Tokens for each token of budget of the rows."""
        return float(self.tokens.sum() / (self.num_rows * self.max_tokens))

    @property
    def run_spread(self) -> float:
        """(largest - smallest) / mean of the processes' predicted cost, over the epoch."""
        return float(_spread(self.costs.sum(axis=0)))

    @property
    def step_spreads(self) -> np.ndarray:
        """The same within each step, float64 [steps]."""
        return _spread(self.costs)

    @property
    def waiting(self) -> float:
        """Share of the processes' time spent on waiting for the slowest, by predicted cost."""
        return float(1 - self.costs.mean(axis=1).sum() / self.costs.max(axis=1).sum())

    def __str__(self) -> str:
        num_processes = self.rows.shape[1]
        batches = pluralize(self.num_steps, "batch", "batches")
        line = (
            f"{pluralize(self.num_rows, 'row')} of at most {self.max_tokens:,} tokens, "
            f"{self.fill:.1%} full (no packing has fewer than {self.fewest_rows:,}), {batches} for "
            f"each of {pluralize(num_processes, 'process', 'processes')}"
        )
        if num_processes > 1:
            line += (
                f"; predicted cost differs by {self.run_spread:.2%} between them in all, in a "
                f"batch by {self.step_spreads.max():.2%} at most; {self.waiting:.2%} is waiting"
            )
        if self.num_empty:
            empty = pluralize(self.num_empty, "batch", "batches")
            line += f"; {empty} of padding alone, as there are too few trees"
        return line


def _spread(costs: np.ndarray) -> np.ndarray:
    return np.ptp(costs, axis=-1) / costs.mean(axis=-1)
