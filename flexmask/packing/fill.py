"""Trees assigned to rows: bin packing, and the balance of costs.

The fewest rows are bounded from below by Martello and Toth's L2. `best_fit` comes close to that:
each tree goes into the fullest row that has room, large trees first. `spread_out` goes for balance
instead: each tree into the row of least cost, in a given number of rows, which may be too few for
it. n trees take O(n log n) either way.

All functions here take `sizes`, the tokens of each tree, int64 [n], each at most `max_tokens`, the
capacity of a row; those that return rows return the row of each tree, int64 [n].
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush

import numpy as np

_MAX_LOOKS = 32  # rows without room that one tree looks at before `spread_out` gives up


def fewest_rows(sizes: np.ndarray, max_tokens: int) -> int:
    """A number of rows that no packing is below."""
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


def from_large(sizes: np.ndarray) -> np.ndarray:
    """The order from the largest to the smallest, int64 [n]; equals keep theirs."""
    return np.argsort(-sizes, kind="stable")


def shuffled_by_octave(sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An order from large to small that is random within each octave of sizes, int64 [n]."""
    order = generator.permutation(sizes.size)
    return order[from_large(np.frexp(sizes[order])[1])]


def best_fit(sizes: np.ndarray, max_tokens: int, order: np.ndarray) -> np.ndarray:
    """Rows of trees taken in `order`: the fullest that has room, else a new one.

    An order from large to small makes few rows.
    """
    rows = np.empty(sizes.size, np.int64)
    rooms: list[tuple[int, int]] = []
    for tree, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, (size, -1))
        room, row = rooms.pop(place) if place < len(rooms) else (max_tokens, len(rooms))
        rows[tree] = row
        insort(rooms, (room - size, row))
    return rows


def spread_out(
    sizes: np.ndarray, costs: np.ndarray, max_tokens: int, num_rows: int, order: np.ndarray
) -> np.ndarray | None:
    """Rows of trees taken in `order`: the row of least cost that has room; None if some has none.

    An order from large to small makes rows of about the same cost. `costs` are float64 [n].
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


def fill_rows(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """Few rows, of about the same size where that takes no more.

    Never more than the trees need in the order given, each row filled before the next.
    """
    order = from_large(sizes)
    rows = best_fit(sizes, max_tokens, order)
    in_order = _next_fit(sizes, max_tokens)
    if in_order.max(initial=-1) < rows.max(initial=-1):
        rows = in_order
    for num_rows in (fewest_rows(sizes, max_tokens), int(rows.max(initial=-1)) + 1):
        even = spread_out(sizes, sizes.astype(np.float64), max_tokens, num_rows, order)
        if even is not None:
            return even
    return rows


def _next_fit(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """Rows of the trees in the order given: the last one where it has room, else a new one."""
    rows = np.empty(sizes.size, np.int64)
    row, filled = 0, 0
    for tree, size in enumerate(sizes.tolist()):
        if filled + size > max_tokens:
            row, filled = row + 1, 0
        rows[tree] = row
        filled += size
    return rows


def use_all_rows(rows: np.ndarray, sizes: np.ndarray, num_rows: int) -> np.ndarray:
    """The same rows, with those of most trees halved until there are `num_rows`.

    Many small trees are easily spread over other rows later. Rows of one tree cannot be halved, so
    there are fewer than `num_rows` where trees are few.
    """
    rows = rows.copy()
    for new_row in range(int(rows.max()) + 1, num_rows):
        counts = np.bincount(rows)
        if counts.max() == 1:
            break
        held = np.flatnonzero(rows == counts.argmax())
        rows[held[from_large(sizes[held])][1::2]] = new_row
    return rows


def spread_evenly(
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
