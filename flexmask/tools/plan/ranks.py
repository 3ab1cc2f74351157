"""Rows handed to data-parallel ranks: how long ranks wait for each other.

Costs are those of `CostModel`: linear in tokens and visible pairs. Rows of as many tokens can
differ in cost many times over, because a token late in a long conversation sees more keys.
"""

from __future__ import annotations

import heapq
from typing import Literal

import numpy as np

from flexmask.errors import DataError

Sync = Literal["row", "step"]


def pack_by_tokens(num_tokens: np.ndarray, capacity: int) -> list[list[int]]:
    """Conversations in each row: the largest first, into the fullest row that has room.

    Raises:
        DataError: a conversation that fits in no row.
    """
    if num_tokens.max() > capacity:
        raise DataError(
            f"conversations must have at most {capacity} tokens, got {num_tokens.max()}; "
            "split them first"
        )
    rows: list[list[int]] = []
    room = np.empty(num_tokens.size, np.int64)
    for item in np.argsort(-num_tokens, kind="stable").tolist():
        size = num_tokens[item]
        free = room[: len(rows)]
        fitting = np.flatnonzero(free >= size)
        if fitting.size:
            best = int(fitting[free[fitting].argmin()])
            rows[best].append(item)
            room[best] -= size
        else:
            room[len(rows)] = capacity - size
            rows.append([item])
    return rows


def pack_by_cost(num_tokens: np.ndarray, costs: np.ndarray, capacity: int) -> list[list[int]]:
    """The same, filled evenly: the most costly first, into the cheapest row that has room.

    As many rows as `pack_by_tokens` makes, or a hundredth more until everything has found room.

    Raises:
        DataError: a conversation that fits in no row.
    """
    num_rows = len(pack_by_tokens(num_tokens, capacity))
    order = np.argsort(-costs, kind="stable").tolist()
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        room = np.full(num_rows, capacity, np.int64)
        load = np.zeros(num_rows)
        for item in order:
            fitting = np.flatnonzero(room >= num_tokens[item])
            if not fitting.size:
                break
            row = int(fitting[load[fitting].argmin()])
            rows[row].append(item)
            room[row] -= num_tokens[item]
            load[row] += costs[item]
        else:
            return rows
        num_rows += -(-num_rows // 100)


def idle_share(
    costs: np.ndarray, num_ranks: int, rows_per_step: int, *, by_cost: bool, sync: Sync
) -> float:
    """The share of all ranks' time that is spent waiting for the slowest.

    Every rank computes `rows_per_step` rows in a step, since collective operations have to match.
    Rows that do not fill a last step are left out.

    Args:
        costs: of the rows, in the order of training.
        num_ranks: data-parallel ranks.
        rows_per_step: rows of a rank in one optimizer step.
        by_cost: deal the rows of a step out by cost, not as they come.
        sync: "row" where ranks wait for each other at every row, as FSDP does when it gathers
            weights; "step" where they do at the end of a step only, as DDP under `no_sync`.

    Raises:
        DataError: not enough rows for one step.
    """
    per_step = num_ranks * rows_per_step
    num_steps = len(costs) // per_step
    if not num_steps:
        raise DataError(f"a step needs {per_step} rows, got {len(costs)}")
    used = costs[: num_steps * per_step].reshape(num_steps, per_step)
    elapsed = 0.0
    for step in used:
        ordered = -np.sort(-step) if by_cost else step
        if sync == "row":  # neighbours run at the same time
            elapsed += ordered.reshape(rows_per_step, num_ranks).max(1).sum()
        elif by_cost:
            elapsed += max(_even_sums(ordered, num_ranks, rows_per_step))
        else:
            elapsed += ordered.reshape(rows_per_step, num_ranks).sum(0).max()
    return float(1 - used.sum() / (num_ranks * elapsed))


def _even_sums(ordered: np.ndarray, num_ranks: int, rows_per_step: int) -> list[float]:
    """Sums of `rows_per_step` costs each: the largest first, to the rank with the least so far."""
    heap = [(0.0, rank, 0) for rank in range(num_ranks)]
    sums = []
    for cost in ordered.tolist():
        total, rank, count = heapq.heappop(heap)
        if count + 1 == rows_per_step:
            sums.append(total + cost)
        else:
            heapq.heappush(heap, (total + cost, rank, count + 1))
    return sums
