"""Trees assigned to rows: as few rows as possible, and all of about the same cost.

The fewest rows are bounded from below as in bin packing (Martello and Toth's bound L2). Rows are
filled by the first of these that succeeds:

1. from large to small, each tree into the row of least cost, in as many rows as the bound says;
2. best fit, largest first, which opens a row where none has room; then rule 1 in so many rows;
3. best fit in so many rows, with the smallest capacity for which it succeeds (MULTIFIT).

n trees take O(n log n); a tree looks at a limited number of rows without room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush

import numpy as np

_MAX_LOOKS = 32  # rows without room that one tree looks at before rule 1 gives up
_HALVINGS = 12  # of the interval in which the smallest capacity lies


def fewest_rows(sizes: np.ndarray, max_tokens: int) -> int:
    """A number of rows that no packing is below.

    Args:
        sizes: tokens of each tree, int64 [n], each at most `max_tokens`.
        max_tokens: capacity of a row.
    """
    ordered = np.sort(sizes)
    before = np.concatenate(([0], np.cumsum(ordered)))
    half = int(np.searchsorted(ordered, max_tokens // 2, side="right"))
    # For a size s up to half a row: trees above max_tokens - s leave no room for any from s up to
    # half a row; those share the rows of the trees in between, or have rows of their own.
    small = np.concatenate(([0], np.flatnonzero(np.diff(ordered[:half]) > 0) + 1))
    least = ordered[small] if half else np.zeros(1, np.int64)
    alone = np.searchsorted(ordered, max_tokens - least, side="right")
    between = np.maximum(alone, half)
    num_big = sizes.size - half
    room = (between - half) * max_tokens - (before[between] - before[half])
    left_over = before[half] - before[small] - room
    bounds = num_big + np.maximum(0, -(-left_over // max_tokens))
    return int(bounds.max(initial=0))


def fill_rows(
    sizes: np.ndarray, costs: np.ndarray, max_tokens: int, *, multiple_of: int = 1
) -> np.ndarray:
    """The row of each tree, int64 [n]; as few rows as the rules find, of about the same cost.

    Args:
        sizes: tokens of each tree, int64 [n], each at most `max_tokens`.
        costs: predicted cost of each, float64 [n].
        max_tokens: capacity of a row.
        multiple_of: the number of rows is rounded up to a multiple of this many, and all of them
            are used as far as there are trees.
    """
    num_rows = round_up(fewest_rows(sizes, max_tokens), multiple_of)
    from_large = np.argsort(-costs, kind="stable")
    rows = fill_least(sizes, costs, max_tokens, num_rows, from_large)
    if rows is not None:
        return rows
    rows = _best_fit(sizes, max_tokens)
    num_rows = max(num_rows, round_up(int(rows.max()) + 1, multiple_of))
    rows = fill_least(sizes, costs, max_tokens, num_rows, from_large)
    return _fill_evenly(sizes, max_tokens, num_rows) if rows is None else rows


def fewer_rows(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """The row of each tree as `fill_rows` has it, or in the order given where that needs fewer."""
    rows = fill_rows(sizes, sizes.astype(np.float64), max_tokens)
    in_order = np.empty_like(rows)
    row, filled = 0, 0
    for tree, size in enumerate(sizes.tolist()):
        if filled + size > max_tokens:
            row, filled = row + 1, 0
        in_order[tree] = row
        filled += size
    return in_order if in_order.max(initial=-1) < rows.max(initial=-1) else rows


def shuffled_by_octave(costs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An order from large to small that is random within each octave of cost, int64 [n]."""
    order = generator.permutation(costs.size)
    return order[np.argsort(-np.frexp(costs[order])[1], kind="stable")]


def fill_least(
    sizes: np.ndarray, costs: np.ndarray, max_tokens: int, num_rows: int, order: np.ndarray
) -> np.ndarray | None:
    """The row of each tree, taken in `order`, each into the row of least cost that has room.

    Returns:
        int64 [n], or None where some tree found no room.
    """
    rows = np.empty(sizes.size, np.int64)
    filled = [0] * num_rows
    heap = [(0.0, row) for row in range(num_rows)]  # (cost, row), ordered as it is
    for tree, size, cost in zip(
        order.tolist(), sizes[order].tolist(), costs[order].tolist(), strict=True
    ):
        full: list[tuple[float, int]] = []
        while heap and filled[heap[0][1]] + size > max_tokens and len(full) < _MAX_LOOKS:
            full.append(heappop(heap))
        if not heap or len(full) == _MAX_LOOKS:
            return None
        before, row = heappop(heap)
        rows[tree] = row
        filled[row] += size
        heappush(heap, (before + cost, row))
        for entry in full:
            heappush(heap, entry)
    return rows


def round_up(number: int, multiple_of: int) -> int:
    """The smallest multiple of `multiple_of` that is at least `number`."""
    return -(-number // multiple_of) * multiple_of


def _fill_evenly(sizes: np.ndarray, max_tokens: int, num_rows: int) -> np.ndarray:
    """Best fit with the smallest capacity for which `num_rows` rows, known to suffice, suffice."""
    best = _best_fit(sizes, max_tokens)
    low, high = max(int(sizes.max()), -(-int(sizes.sum()) // num_rows)), max_tokens
    for _ in range(_HALVINGS):
        if low >= high:
            break
        capacity = (low + high) // 2
        rows = _best_fit(sizes, capacity)
        if rows.max() < num_rows:
            best, high = rows, capacity
        else:
            low = capacity + 1
    return best


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each tree: largest first, into the fullest row with room, else into a new one."""
    rows = np.empty(sizes.size, np.int64)
    order = np.argsort(-sizes, kind="stable")
    rooms: list[tuple[int, int]] = []
    for tree, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, (size, -1))
        room, row = rooms.pop(place) if place < len(rooms) else (capacity, len(rooms))
        rows[tree] = row
        insort(rooms, (room - size, row))
    return rows
