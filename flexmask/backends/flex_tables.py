"""FlexAttention's block tables: kept for eager callers, in-graph for compiled ones.

A BlockMask is eight index tensors and a mask function. The tensors depend on the mask only, so that
all layers of a model that see equally far share them; the function is made anew inside the compiled
region.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import noop_mask
from torch.nn.functional import pad

from flexmask.backends.cache import derived
from flexmask.tree.block_mask import build_block_mask

BLOCK = 128  # tokens on a side of a tile, FlexAttention's default


class BlockTables(NamedTuple):
    """Counts int32 [B, 1, N] and indices int32 [B, 1, N, width] of N blocks, as in BlockMask.

    All four index tables have one width, at least 2: sizes that are equal at times, or 1, make
    `torch.compile` compile again.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor

    def rows(self, batch: int) -> list[BlockTables]:
        """The tables of each of `batch` rows by itself; they may share those of one."""
        expanded = (x.expand(batch, *x.shape[1:]) for x in self)
        return [
            BlockTables(*(x.clone() for x in row))  # not views: their bases are guarded on
            for row in zip(*(x.split(1) for x in expanded), strict=True)
        ]


def block_tables(
    subtree_end: Tensor, position_ids: Tensor | None, position_floor: Tensor | None
) -> BlockTables:
    """The tables of a mask, on its device; eager callers get them once for all layers.

    Args:
        subtree_end: int [B, L].
        position_ids: int [B, L]; looked at with a floor only.
        position_floor: int [B, L], the lowest position that a query sees; None for all.
    """
    if torch.compiler.is_compiling():
        return tables_from_grid(subtree_end, position_ids, position_floor)
    if position_ids is None or position_floor is None:
        return derived(tables_from_ranges, subtree_end, key=BLOCK)
    return derived(tables_from_grid, subtree_end, position_ids, position_floor, key=BLOCK)


def tables_from_ranges(subtree_end: Tensor) -> BlockTables:
    """The tables in O(L) time plus O(visited tiles), on the host: waits for the device."""
    ends = subtree_end.to("cpu", copy=True).numpy()  # a copy, or `derived` keeps nothing of it
    mask = build_block_mask(ends, BLOCK, noop_mask, subtree_end.device)
    tables = BlockTables(*(getattr(mask, name) for name in BlockTables._fields))
    width = max(2, *(table.shape[-1] for table in tables[1::2]))
    return BlockTables(
        *(x if x.ndim == 3 else pad(x, (0, width - x.shape[3])) for x in tables),
    )


def tables_from_grid(
    subtree_end: Tensor, position_ids: Tensor | None, position_floor: Tensor | None
) -> BlockTables:
    """The tables by tensor operations on a grid of N x N tiles: traceable, without a wait.

    With a floor, a tile is full only if its lowest key is above all floors, and is left out only if
    its highest key is below all of them.
    """
    highest = _by_block(subtree_end).amax(-1)  # [B, N], by key block
    lowest = _by_block(subtree_end).amin(-1)  # 0 where the last block is ragged
    block = torch.arange(highest.shape[1], device=subtree_end.device)
    query, key = block[:, None], block[None, :]
    visited = (key <= query) & (query * BLOCK < highest[:, None, :])  # [B, N, N]
    full = (key < query) & ((query + 1) * BLOCK <= lowest[:, None, :])
    if position_floor is not None and position_ids is not None:
        positions, floors = (
            _by_block(
                torch.cat((x, x[:, -1:].expand(-1, -x.shape[1] % BLOCK)), 1)
            )  # the last again
            for x in (position_ids, position_floor)
        )
        visited &= positions.amax(-1)[:, None, :] >= floors.amin(-1)[:, :, None]
        full &= positions.amin(-1)[:, None, :] >= floors.amax(-1)[:, :, None]
    return tables_of_tiles(visited & ~full, full)


def tables_of_tiles(partial: Tensor, full: Tensor) -> BlockTables:
    """The tables of tiles given as two grids bool [B, N, N], queries down and keys across."""
    by_query = (*_listed(partial), *_listed(full))
    by_key = (*_listed(partial.transpose(1, 2)), *_listed(full.transpose(1, 2)))
    return BlockTables(*by_query, *by_key)


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each line are set, [B, 1, N], and these columns first, [B, 1, N, N]."""
    order = torch.argsort(grid.to(torch.int8).contiguous(), dim=-1, descending=True, stable=True)
    return grid.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


def _by_block(x: Tensor) -> Tensor:
    """Tokens [B, L] as blocks [B, N, BLOCK], the last filled up with zeros."""
    return pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
