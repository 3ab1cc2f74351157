"""FlexAttention's BlockMask, built from tile ranges instead of from an L x L mask.

`create_block_mask` evaluates the mask at every pair and sorts dense grids of blocks. Here all eight
index tensors come straight from the tile ranges, in O(L) time plus O(visited tiles), and agree with
it block for block. Each index tensor stores as many entries a row as its longest row needs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.tree.tiles import TileRanges, tile_ranges

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_block_mask(ends: np.ndarray, block_size: int, mask_mod: MaskMod, device: torch.device):
    """The BlockMask [B, 1, L, L] of rows with subtree ends `ends` [B, L], on `device`.

    Args:
        ends: subtree ends, int32 [B, L].
        block_size: tile size in tokens, for queries and keys.
        mask_mod: the callable that FlexAttention evaluates inside partial tiles.
        device: where the index tensors go.
    """
    length = ends.shape[1]
    ranges = [tile_ranges(end, block_size, block_size) for end in ends]
    by_query, by_key = zip(*(_sorted_pairs(row) for row in ranges), strict=True)
    num_blocks = ranges[0].num_q_blocks

    def tables(rows, is_full: bool) -> tuple[Tensor, Tensor]:
        picked = [(line[full == is_full], column[full == is_full]) for line, column, full in rows]
        return _index_tables(picked, num_blocks, device)

    kv_num_blocks, kv_indices = tables(by_query, False)
    full_kv_num_blocks, full_kv_indices = tables(by_query, True)
    q_num_blocks, q_indices = tables(by_key, False)
    full_q_num_blocks, full_q_indices = tables(by_key, True)
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=mask_mod,
    )


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def _sorted_pairs(ranges: TileRanges) -> tuple[Pairs, Pairs]:
    """The visited tiles as (query, key, is_full) sorted by query, and (key, query, ...) by key."""
    query, key, is_full = ranges.pairs()
    # A stable sort of small unsigned integers is a radix sort: linear in the visited tiles.
    small = query.astype(np.uint16) if ranges.num_q_blocks <= 1 << 16 else query
    order = np.argsort(small, kind="stable")
    return (query[order], key[order], is_full[order]), (key, query, is_full)


def _index_tables(
    rows: list[tuple[np.ndarray, np.ndarray]], num_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Counts [B, 1, num_blocks] and column indices [B, 1, num_blocks, num_blocks], both int32."""
    counts = np.stack([np.bincount(line, minlength=num_blocks) for line, _ in rows])
    width = max(1, int(counts.max()))
    # Shape [num_blocks, num_blocks] over rows that lie `width` apart: entries past a row's count
    # are never used, so they may alias the rows below instead of taking memory of their own.
    table = np.zeros((len(rows), num_blocks * width + num_blocks - width), np.int32)
    for b, (line, column) in enumerate(rows):
        rank = np.arange(line.size) - np.repeat(np.cumsum(counts[b]) - counts[b], counts[b])
        table[b, line * width + rank] = column
    indices = torch.from_numpy(table).to(device)
    return (
        torch.from_numpy(counts.astype(np.int32)).unsqueeze(1).to(device),
        indices.as_strided(
            (len(rows), 1, num_blocks, num_blocks), (table.shape[1], table.shape[1], width, 1)
        ),
    )
