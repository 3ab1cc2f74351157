"""The plan of the `cpu` backend: a row's visible pairs as a list of kernel calls.

The row is cut into bundles of queries: one long chain (heavy path), or several short neighbours. In
preorder, the keys outside a bundle that any of its rows sees are ancestors of its first row:

* those that all its rows see make a rectangle without a mask, contiguous for the branches of a
  conversation in heavy-first order (but any preorder gives the exact answer);
* the others join the bundle's own rows. Those are a causal square if the bundle is a chain, which
  is halved into squares and rectangles until it is small, because the kernels are much faster on
  rectangles; else they are a rectangle with a small mask.

A mask has at most MAX_ROWS rows and the plan O(L) calls: nothing is of size L x L at any depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from flexmask.tree.chains import chain_starts, find_ancestors
from flexmask.tree.intervals import find_depths

MAX_ROWS = 512  # the kernels take 512 keys at a time: each row must see one of the first, its own
_SQUARE_ROWS = 256  # a causal square of more rows is halved [measured]
_WINDOW_ROWS = 256  # a chain whose queries do not see all their ancestors is cut after so many rows
_CALL_PAIRS = 4096  # what a kernel call costs on top of its pairs, in pairs [measured]
_CALL_ROWS = 24  # what a kernel call costs per key on top of its rows, in rows [measured]
_MANY_ROWS = 768  # from here on the kernels take 256 queries at a time, not 64, and read keys less
_NEAR_KEYS = 512  # fewer rows are faster with so many keys at a time, in the cache [measured]

Keys = slice | Tensor


class Pairs(Enum):
    """Which pairs of a call's queries and keys are visible."""

    ALL = "all"
    CAUSAL = "lower triangle"
    MASKED = "by subtree end and window start"
    SELF = "diagonal"


@dataclass(frozen=True, slots=True)
class Call:
    """Queries [start, stop) attend to `keys`, a slice or an int64 index of the same row.

    `is_first` marks the call that meets its queries first: there is nothing to merge with yet.
    """

    start: int
    stop: int
    keys: Keys
    pairs: Pairs
    is_first: bool = False

    @property
    def rows(self) -> slice:
        """The queries."""
        return slice(self.start, self.stop)


def plan_rows(subtree_end: Tensor, window_start: Tensor | None = None) -> list[tuple[Call, ...]]:
    """The calls that cover each visible pair of each row exactly once.

    Args:
        subtree_end: int [B, L], on the CPU.
        window_start: int [B, L], the first token that a query sees; None for all.
    """
    starts = [None] * len(subtree_end) if window_start is None else window_start.numpy()
    return [_plan(*row) for row in zip(subtree_end.numpy(), starts, strict=True)]


def cut_calls(calls: Iterable[Call]) -> Iterator[Call]:
    """The same pairs in blocks of at most MAX_ROWS rows and keys, to hold their scores in memory.

    Causal squares are small enough, and a diagonal has one score a row. A row may see no key of a
    block, but sees one of the first block that it is in: its own, as in every call.
    """
    for call in calls:
        if call.pairs not in (Pairs.ALL, Pairs.MASKED):
            yield call
            continue
        for start in range(call.start, call.stop, MAX_ROWS):
            rows = (start, min(start + MAX_ROWS, call.stop))
            for number, keys in enumerate(_split(call.keys, MAX_ROWS)):
                yield Call(*rows, keys, call.pairs, call.is_first and number == 0)


def _split(keys: Keys, size: int) -> list[Keys]:
    if isinstance(keys, Tensor):
        return list(keys.split(size))
    starts = range(keys.start, keys.stop, size)
    return [slice(start, min(start + size, keys.stop)) for start in starts]


def _plan(end: np.ndarray, window_start: np.ndarray | None) -> tuple[Call, ...]:
    depth = find_depths(end)
    if window_start is not None and not depth[window_start].any():
        window_start = None  # every query sees all of its path
    roots = np.flatnonzero(depth == 0)
    calls: list[Call] = []
    for start, stop, is_chain, is_alone in _cut(end, depth, is_windowed=window_start is not None):
        if is_alone:
            calls.append(Call(start, stop, slice(start, stop), Pairs.SELF, True))
            continue
        root = int(roots[np.searchsorted(roots, start, side="right") - 1])
        ancestors = find_ancestors(end, start, root)
        is_full, is_seen = end[ancestors] >= stop, np.ones(ancestors.size, bool)
        if window_start is not None:
            low, high = window_start[start:stop].min(), window_start[start:stop].max()
            is_full &= ancestors >= high
            is_seen = ancestors >= low
            is_chain = is_chain and start >= high
        full, partial = ancestors[is_full], ancestors[is_seen & ~is_full]
        if is_chain and not partial.size:
            calls.extend(_causal(start, stop))
        else:
            local = _as_keys(np.concatenate([np.arange(start, stop), partial]))
            calls.append(Call(start, stop, local, Pairs.MASKED, True))
        calls.extend(_rectangle(start, stop, full))
    return tuple(calls)


def _causal(start: int, stop: int) -> Iterator[Call]:
    """The causal square of a chain on itself."""
    if stop - start <= _SQUARE_ROWS:
        yield Call(start, stop, slice(start, stop), Pairs.CAUSAL, True)
        return
    middle = (start + stop) // 2
    yield from _causal(start, middle)
    yield from _causal(middle, stop)
    yield Call(middle, stop, slice(start, middle), Pairs.ALL)


def _rectangle(start: int, stop: int, keys: np.ndarray) -> Iterator[Call]:
    """Rows [start, stop) on all of `keys`."""
    step = _NEAR_KEYS if stop - start < _MANY_ROWS else max(1, keys.size)
    for first in range(0, keys.size, step):
        yield Call(start, stop, _as_keys(keys[first : first + step]), Pairs.ALL)


def _cut(
    end: np.ndarray, depth: np.ndarray, *, is_windowed: bool
) -> Iterator[tuple[int, int, bool, bool]]:
    """The bundles as (start, stop, is_chain, is_alone).

    `is_alone` marks a run of tokens that see only themselves, as padding does. Neighbouring chains
    are joined as long as that costs less than to keep them apart.
    """
    starts = chain_starts(end)
    if is_windowed:
        starts = np.union1d(starts, np.arange(0, end.size, _WINDOW_ROWS))
    stops = np.append(starts[1:], end.size)
    heads = depth[starts]
    alone = (heads == 0) & (end[starts] == starts + 1)
    pieces = zip(starts.tolist(), stops.tolist(), heads.tolist(), alone.tolist(), strict=True)
    start, stop, head, is_alone = next(pieces)
    num_full, is_chain = head, True
    cost = _cost(stop - start, num_full, 0, is_chain)
    for next_start, next_stop, next_head, next_alone in pieces:
        next_cost = _cost(next_stop - next_start, next_head, 0, True)
        shared = min(num_full, next_head)
        joined = _cost(next_stop - start, shared, head - shared, False)
        if is_alone or next_alone:
            is_joined = is_alone and next_alone
        else:
            is_joined = next_stop - start <= MAX_ROWS and joined < cost + next_cost
        if is_joined:
            stop, num_full, is_chain, cost = next_stop, shared, False, joined
            continue
        yield start, stop, is_chain, is_alone
        start, stop, head, is_alone = next_start, next_stop, next_head, next_alone
        num_full, is_chain, cost = next_head, True, next_cost
    yield start, stop, is_chain, is_alone


def _cost(num_rows: int, num_full: int, num_partial: int, is_chain: bool) -> float:
    """The expected cost of a bundle, in pairs of one large call."""
    num_local = num_rows / 2 if is_chain else num_rows + num_partial
    num_calls = 1 if num_full == 0 else 2
    return num_calls * _CALL_PAIRS + (num_rows + _CALL_ROWS) * (num_full + num_local)


def _as_keys(index: np.ndarray) -> Keys:
    first, last = int(index[0]), int(index[-1])
    if last - first == index.size - 1 and (np.diff(index) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(index.astype(np.int64))
