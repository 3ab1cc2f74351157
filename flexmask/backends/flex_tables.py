"""FlexAttention's block tables: kept for eager callers, in-graph for compiled ones.

A BlockMask is eight index tensors and a mask function. The tensors depend on the mask only, so that
all layers of a model that see equally far share them; the function is made anew inside the compiled
region.
"""

from __future__ import annotations

import torch
from flexmask_kernels.planning import classify_tiles
from torch import Tensor

from flexmask.backends.cache import is_capturing, per_mask_cache
from flexmask.tree.block_mask import BlockTables, index_tables
from flexmask.tree.tiles import tiles_of_rows

BLOCK = 128  # tokens on a side of a tile, FlexAttention's default


def block_tables(
    subtree_end: Tensor, window_start: Tensor | None, block: tuple[int, int] = (BLOCK, BLOCK)
) -> BlockTables:
    """The tables of a mask, on its device; eager callers get them once for all layers.

    Args:
        subtree_end: int [B, L].
        window_start: int [B, L], the first token that a query sees; None for all.
        block: queries and keys of a tile.
    """
    masks = (subtree_end,) if window_start is None else (subtree_end, window_start)
    if torch.compiler.is_compiling() or is_capturing():  # neither waits for the device
        return tables_from_grid(*masks, block=block)
    return per_mask_cache(tables_from_tiles, *masks, block=block)


def tables_from_tiles(
    subtree_end: Tensor, window_start: Tensor | None = None, *, block: tuple[int, int]
) -> BlockTables:
    """The tables in O(L) time plus O(visited tiles), on the host: waits for the device."""
    tiles = tiles_of_rows(subtree_end, window_start, *block)
    tables = index_tables(tiles, subtree_end.device)
    return BlockTables(*(x.contiguous() for x in tables))


def split_rows(tables: BlockTables, batch: int) -> list[BlockTables]:
    """The tables of each of `batch` rows by itself; they may share those of one."""
    expanded = (x.expand(batch, *x.shape[1:]) for x in tables)
    return [
        BlockTables(*(x.clone() for x in row))  # not views: their bases are guarded on
        for row in zip(*(x.split(1) for x in expanded), strict=True)
    ]


def tables_from_grid(
    subtree_end: Tensor, window_start: Tensor | None = None, *, block: tuple[int, int]
) -> BlockTables:
    """The tables by tensor operations on a grid of all tiles: traceable, without a wait."""
    visited, full = classify_tiles(subtree_end, window_start, *block)
    partial = visited & ~full
    grids = (partial, full, partial.mT, full.mT)  # in the order of the tables
    return BlockTables(*(table for grid in grids for table in _listed(grid)))


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each line are set, [B, 1, N], and these columns first, [B, 1, N, M]."""
    order = torch.argsort(grid.to(torch.int8).contiguous(), dim=-1, descending=True, stable=True)
    return grid.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
