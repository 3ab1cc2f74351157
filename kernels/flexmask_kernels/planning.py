"""Launches of the kernels in `ranges`: from subtree ends to the work of each program."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flexmask_kernels.configs import Config
from flexmask_kernels.launches import LaunchQueue
from flexmask_kernels.ranges import (
    block_bounds_kernel,
    key_ranges_kernel,
    list_tiles_kernel,
    order_lines_kernel,
)

_CHUNK = 128  # blocks that a program of `ranges` looks at in one step
_RANKED = 16  # lines that a program ranks; more of them take long to compile


class Plan(NamedTuple):
    """What each line, the block of queries or keys that a program owns, has to visit.

    Attributes:
        lines: int32 [rows, num_lines, 4], see `ranges`.
        tiles: int32 [rows, num_lines, capacity], or None where two ranges say it all.
        order: int32 [rows, num_lines], the longest line first.
    """

    lines: Tensor
    tiles: Tensor | None
    order: Tensor

    @property
    def capacity(self) -> int:
        """The most tiles that a line can have; 0 without lists."""
        return 0 if self.tiles is None else self.tiles.shape[2]


def plan_lines(
    queue: LaunchQueue,
    end: Tensor,
    positions: Tensor | None,
    floor: Tensor | None,
    config: Config,
    *,
    by_key: bool,
) -> Plan:
    """The plan of every row of the mask; launches only, the host reads nothing.

    Args:
        queue: where the launches go.
        end: int32 [rows, L], contiguous.
        positions: int32 [rows, L], contiguous; None without a floor.
        floor: like `positions`, the lowest one that a query sees.
        config: its tile size.
        by_key: lines are blocks of keys, else of queries.
    """
    rows, length = end.shape
    num_q, num_k = triton.cdiv(length, config.block_q), triton.cdiv(length, config.block_k)
    num_lines, capacity = (num_k, num_q) if by_key else (num_q, num_k)
    lines = torch.empty(rows, num_lines, 4, dtype=torch.int32, device=end.device)
    order = torch.empty(rows, num_lines, dtype=torch.int32, device=end.device)
    tiles = None
    if by_key and floor is None:
        queue.add(
            key_ranges_kernel,
            (num_lines, rows),
            end_ptr=end,
            plan_ptr=lines,
            L=length,
            num_lines=num_lines,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
        )
    else:
        key_bounds = _block_bounds(queue, end, positions, config.block_k)
        query_bounds = None
        if floor is not None:
            query_bounds = _block_bounds(queue, end, floor, config.block_q)
        tiles = torch.empty(rows, num_lines, capacity, dtype=torch.int32, device=end.device)
        queue.add(
            list_tiles_kernel,
            (num_lines, rows),
            query_bounds_ptr=query_bounds,
            key_bounds_ptr=key_bounds,
            plan_ptr=lines,
            tiles_ptr=tiles,
            num_q_blocks=num_q,
            num_k_blocks=num_k,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            BY_KEY=by_key,
            HAS_FLOOR=floor is not None,
            CHUNK=_CHUNK,
        )
    queue.add(
        order_lines_kernel,
        (triton.cdiv(num_lines, _RANKED), rows),
        plan_ptr=lines,
        order_ptr=order,
        num_lines=num_lines,
        BLOCK=_RANKED,
        CHUNK=_CHUNK,
    )
    return Plan(lines, tiles, order)


def _block_bounds(queue: LaunchQueue, end: Tensor, reach: Tensor | None, block: int) -> Tensor:
    """Bounds int32 [rows, 4, num_blocks] of blocks of `block` tokens."""
    rows, length = end.shape
    num_blocks = triton.cdiv(length, block)
    bounds = torch.empty(rows, 4, num_blocks, dtype=torch.int32, device=end.device)
    queue.add(
        block_bounds_kernel,
        (num_blocks, rows),
        end_ptr=end,
        reach_ptr=reach,
        bounds_ptr=bounds,
        L=length,
        num_blocks=num_blocks,
        BLOCK=block,
        HAS_FLOOR=reach is not None,
    )
    return bounds
