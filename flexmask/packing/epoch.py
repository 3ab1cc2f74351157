"""One epoch as rows, and rows as the steps of data-parallel processes.

All processes of a step wait for the slowest. So rows are sorted by predicted cost, neighbours go
into the same step, and what is in one is spread over its rows once more. Steps then come in random
order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexmask.errors import pluralize
from flexmask.packing.fill import from_large, spread_out


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


def plan_steps(
    rows: np.ndarray,
    num_rows: int,
    sizes: np.ndarray,
    costs: np.ndarray,
    max_tokens: int,
    *,
    num_processes: int,
    rows_per_batch: int,
    fewest_rows: int,
    generator: np.random.Generator,
) -> EpochPlan:
    """The plan that takes rows as they are filled to steps.

    Args:
        rows: the row of each tree, int64 [n].
        num_rows: how many there are, a multiple of `num_processes`.
        sizes: tokens of each tree, int64 [n].
        costs: predicted cost of each, float64 [n].
        max_tokens: budget of a row.
        num_processes: P.
        rows_per_batch: rows of one process in a step; the last step may have fewer.
        fewest_rows: passed on.
        generator: what the order of the steps is drawn from.
    """
    ends = np.cumsum(np.bincount(rows, minlength=num_rows))[:-1]
    held = np.split(np.argsort(rows, kind="stable"), ends)
    by_cost = from_large(np.bincount(rows, costs, num_rows))
    chunks = by_cost.reshape(-1, num_processes)[generator.permutation(num_rows // num_processes)]
    num_steps = -(-len(chunks) // rows_per_batch)
    batches: list[list[int]] = [[] for _ in range(num_steps * num_processes)]
    totals = np.zeros((3, num_steps, num_processes))
    run_costs = np.zeros(num_processes)
    for number, chunk in enumerate(chunks):
        step = number // rows_per_batch
        taken = _spread_evenly([held[row] for row in chunk], sizes, costs, max_tokens)
        row_costs = np.array([costs[trees].sum() for trees in taken])
        heaviest = from_large(row_costs)
        lightest = np.lexsort((run_costs, totals[2, step]))
        for row, process in zip(heaviest.tolist(), lightest.tolist(), strict=True):
            trees = taken[row]
            batches[step * num_processes + process].extend(trees.tolist())
            totals[:, step, process] += (trees.size > 0, sizes[trees].sum(), row_costs[row])
            run_costs[process] += row_costs[row]
    return EpochPlan(
        batches,
        totals[0].astype(np.int64),
        totals[1].astype(np.int64),
        totals[2],
        max_tokens,
        fewest_rows,
    )


def _spread_evenly(
    held: list[np.ndarray], sizes: np.ndarray, costs: np.ndarray, max_tokens: int
) -> list[np.ndarray]:
    """The trees of some rows spread over them once more, where that evens out their costs."""
    trees = np.concatenate(held)
    if len(held) == 1 or not trees.size:
        return held
    order = from_large(costs[trees])
    rows = spread_out(sizes[trees], costs[trees], max_tokens, len(held), order)
    if rows is None:
        return held
    after = [np.sort(trees[rows == row]) for row in range(len(held))]
    before = [costs[row].sum() for row in held]
    return after if np.ptp([costs[row].sum() for row in after]) < np.ptp(before) else held


def _spread(costs: np.ndarray) -> np.ndarray:
    return np.ptp(costs, axis=-1) / costs.mean(axis=-1)
