"""FlexAttention's block tables: kept for eager callers, in-graph for compiled ones.

A BlockMask is eight index tensors and a mask function. The tensors depend on the mask only, so that
all layers of a model that see equally far share them; the function is made anew inside the compiled
region.
"""

from __future__ import annotations

import torch
from flexmask_kernels.planning import classify_tiles
from torch import Tensor
from torch.nn.functional import pad

from flexmask.backends.cache import per_mask_cache
from flexmask.tree.block_mask import BlockTables, index_tables
from flexmask.tree.tiles import tiles_of_rows

BLOCK = 128  # tokens on a side of a tile, FlexAttention's default


def block_tables(subtree_end: Tensor, window_start: Tensor | None) -> BlockTables:
    """The tables of a mask, on its device; eager callers get them once for all layers.

    Args:
        subtree_end: int [B, L].
        window_start: int [B, L], the first token that a query sees; None for all.
    """
    masks = (subtree_end,) if window_start is None else (subtree_end, window_start)
    if torch.compiler.is_compiling():
        return tables_from_grid(*masks)
    return per_mask_cache(tables_from_tiles, *masks)


def tables_from_tiles(subtree_end: Tensor, window_start: Tensor | None = None) -> BlockTables:
    """The tables in O(L) time plus O(visited tiles), on the host: waits for the device."""
    tiles = tiles_of_rows(subtree_end, window_start, BLOCK, BLOCK)
    tables = index_tables(tiles, subtree_end.device)
    num_blocks = tables.kv_num_blocks.shape[2]
    missing = 1 if num_blocks == 1 else 0  # of two columns: a size of 1 is compiled apart
    return BlockTables(*(x if x.ndim == 3 else pad(x, (0, missing)) for x in tables))


def split_rows(tables: BlockTables, batch: int) -> list[BlockTables]:
    """The tables of each of `batch` rows by itself; they may share those of one."""
    expanded = (x.expand(batch, *x.shape[1:]) for x in tables)
    return [
        BlockTables(*(x.clone() for x in row))  # not views: their bases are guarded on
        for row in zip(*(x.split(1) for x in expanded), strict=True)
    ]


def tables_from_grid(subtree_end: Tensor, window_start: Tensor | None = None) -> BlockTables:
    """The tables by tensor operations on a grid of N x N tiles: traceable, without a wait."""
    visited, full = classify_tiles(subtree_end, window_start, BLOCK, BLOCK)
    partial = visited & ~full
    grids = (partial, full, partial.mT, full.mT)  # in the order of the tables
    return BlockTables(*(table for grid in grids for table in _listed(grid)))


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each line are set, [B, 1, N], and these columns first, [B, 1, N, N]."""
    order = torch.argsort(grid.to(torch.int8).contiguous(), dim=-1, descending=True, stable=True)
    return grid.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
