"""Which tiles a program visits: tensors computed on the device, never read by the host.

A query q sees a key k where start[q] <= k <= q < end[k]; without a window there is no start.
The keys of block j are consecutive and each sees itself, so the queries that see at least one of
them are [first key, max end), and those that see all of them are [last key, min end). A query of
the former sees one of the block, with a window, where start[q] <= last key, and all where
start[q] <= first key.

A line is the block that a program owns, of queries or of keys; of a key block without a window,
the query blocks are one range, the full ones a range inside it, and no list is needed. Any other
program walks a list of blocks: `for` loops over a list are pipelined by the compiler, a `while`
loop that jumps over dead blocks is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexmask_kernels.configs import Config

_TILES_AT_ONCE = 1 << 22  # some 100 MB of what is kept on the way


class Plan(NamedTuple):
    """What each line has to visit, all int32.

    Attributes:
        lines: [rows, num_lines, 4]; numbers of full and of partial tiles; without lists also the
            first block, and the number of partial tiles before the full ones.
        tiles: [rows, num_lines, capacity], full tiles from the front, partial ones from the back;
            capacity is 0 where two ranges say it all.
        order: [rows, num_lines], lines by falling number of tiles.
    """

    lines: Tensor
    tiles: Tensor
    order: Tensor


def plan_lines(end: Tensor, start: Tensor | None = None, *, config: Config, by_key: bool) -> Plan:
    """The plan of every row of a mask.

    Tiles are classified some lines at a time, so that what is kept on the way is bounded, and the
    list is nearly all there is. Sizes follow from L alone: nothing waits for the device.

    Args:
        end: int32 [rows, L], subtree ends.
        start: int32 [rows, L], the first token that each query sees; None for no limit.
        config: its tile size.
        by_key: lines are blocks of keys, else of queries.
    """
    plan = empty_plan(end, start, config=config, by_key=by_key)
    _, num_lines, capacity = plan.tiles.shape
    at_once = max(1, _TILES_AT_ONCE * config[0 if by_key else 1] // end.numel())
    for first in range(0, num_lines, at_once):
        some = slice(first, first + at_once)
        blocks = {"of_keys" if by_key else "of_queries": some}
        visited, full = classify_tiles(end, start, *config[:2], **blocks)
        if by_key:
            visited, full = visited.mT, full.mT
        plan.lines[:, some] = _count(visited, full)
        if capacity:
            plan.tiles[:, some] = _list(visited, full)
    plan.order.copy_(plan.lines[..., :2].sum(2).argsort(dim=1, descending=True, stable=True))
    return plan


def empty_plan(end: Tensor, start: Tensor | None = None, *, config: Config, by_key: bool) -> Plan:
    """The memory of such a plan, of which no value counts yet."""
    rows, length = end.shape
    num_lines, width = -(-length // config.block_q), -(-length // config.block_k)
    if by_key:
        num_lines, width = width, num_lines
    capacity = width if not by_key or start is not None else 0
    shapes = ((rows, num_lines, 4), (rows, num_lines, capacity), (rows, num_lines))
    return Plan(*(end.new_empty(shape, dtype=torch.int32) for shape in shapes))


def _count(visited: Tensor, full: Tensor) -> Tensor:
    """`Plan.lines` of lines whose tiles are bool [rows, lines, capacity]."""
    num_full, num_partial = full.sum(2), (visited & ~full).sum(2)
    first = visited.byte().argmax(2)
    num_front = torch.where(num_full > 0, full.byte().argmax(2) - first, 0)
    return torch.stack((num_full, num_partial, first, num_front), 2)


def _list(visited: Tensor, full: Tensor) -> Tensor:
    """`Plan.tiles` of the same lines."""
    number = visited.shape[2]
    block = torch.arange(number, dtype=torch.int32, device=visited.device)
    rank = torch.where(full, block - number, number - block)
    return torch.where(visited, rank, 0).argsort(2)


def classify_tiles(
    end: Tensor,
    start: Tensor | None,
    block_q: int,
    block_k: int,
    *,
    of_queries: slice = slice(None),
    of_keys: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Which tiles hold a visible pair, and which hold no other: bool [rows, num_q, num_k] each.

    A ragged last block of queries or keys is never full. Only the blocks of queries and of keys
    asked for are looked at.
    """
    length = end.shape[1]
    ends = pad(end, (0, -length % block_k)).unflatten(1, (-1, block_k))[:, of_keys]
    highest, lowest = ends.amax(2)[:, None, :], ends.amin(2)[:, None, :]
    options = {"dtype": torch.int32, "device": end.device}
    # the first of each block
    query = torch.arange(0, length, block_q, **options)[of_queries, None]
    key = torch.arange(0, length, block_k, **options)[of_keys]
    visited = (key < query + block_q) & (query < highest)
    full = (key + block_k <= query + 1) & (query + block_q <= lowest)
    if start is not None:
        token = torch.arange(block_q, **options) + query
        starts = start[:, token.clamp(max=length - 1)]  # [rows, num_q, block_q], the last again
        # of the queries that see one of the keys without a window, the lowest start
        last = (highest - 1 - query).clamp(0, block_q - 1)
        visited &= starts.cummin(2).values.gather(2, last.long()) < key + block_k
        full &= starts.amax(2, keepdim=True) <= key
    return visited, full
