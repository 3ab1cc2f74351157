"""FlexAttention's BlockMask, built from the visited tiles instead of from an L x L mask.

`create_block_mask` evaluates the mask at every pair and sorts dense grids of blocks. Here all eight
index tensors come straight from the tiles, in O(L) time plus O(visited tiles), and agree with it
block for block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmask.tree.intervals import MaskMod
from flexmask.tree.tiles import Tiles


class BlockTables(NamedTuple):
    """Counts int32 [B, 1, N] and indices int32 [B, 1, N, M], as in BlockMask.

    N are the blocks of queries and M those of keys; for the last four the other way round. Each
    line of a table lists its columns first; what follows is never used.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def build_block_mask(
    tiles: Sequence[Tiles], length: int, block_size: int, mask_mod: MaskMod, device: torch.device
) -> BlockMask:
    """The BlockMask [B, 1, L, L] of B rows, on `device`.

    Args:
        tiles: of each row, for blocks of `block_size`.
        length: tokens of a row, L.
        block_size: tile size in tokens, for queries and keys.
        mask_mod: the callable that FlexAttention evaluates inside partial tiles.
        device: where the index tensors go.
    """
    return BlockMask(
        seq_lengths=(length, length),
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=mask_mod,
        **index_tables(tiles, device)._asdict(),
    )


def index_tables(tiles: Sequence[Tiles], device: torch.device) -> BlockTables:
    """The index tensors of a BlockMask, on `device`.

    All four tables store as many entries a line as the longest line of any needs: kernels of torch
    2.11 walk a table of full tiles by the strides of the one of partial tiles.
    """
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for row in tiles:
        # A stable sort of small unsigned integers is a radix sort: linear in the visited tiles.
        small = row.query.astype(np.uint16) if row.num_q_blocks <= 1 << 16 else row.query
        by_query = np.argsort(small, kind="stable")
        for prefix, is_listed in (("", ~row.is_full), ("full_", row.is_full)):
            order = by_query[is_listed[by_query]]
            pairs.setdefault(f"{prefix}kv", []).append((row.query[order], row.key[order]))
            pairs.setdefault(f"{prefix}q", []).append((row.key[is_listed], row.query[is_listed]))
    sizes = tiles[0].num_q_blocks, tiles[0].num_k_blocks
    shapes = {name: sizes if name.endswith("kv") else sizes[::-1] for name in pairs}
    counts = {
        name: np.stack([np.bincount(line, minlength=shapes[name][0]) for line, _ in rows])
        for name, rows in pairs.items()
    }
    width = max(1, *(int(count.max()) for count in counts.values()))
    tables = {}
    for name, rows in pairs.items():
        count = torch.from_numpy(counts[name].astype(np.int32))
        tables[f"{name}_num_blocks"] = count.unsqueeze(1).to(device)
        tables[f"{name}_indices"] = _index_table(rows, counts[name], width, shapes[name]).to(device)
    return BlockTables(**tables)


def _index_table(
    rows: list[tuple[np.ndarray, np.ndarray]],
    counts: np.ndarray,
    width: int,
    shape: tuple[int, int],
) -> Tensor:
    """The columns of each line first, int32 [B, 1, N, M] where `shape` is (N, M).

    Lines lie `width` apart in memory: entries past a line's count are never used, so they may alias
    the lines below instead of taking memory of their own.
    """
    N, M = shape
    table = np.zeros((len(rows), N * width + max(0, M - width)), np.int32)
    for b, (line, column) in enumerate(rows):
        rank = np.arange(line.size) - np.repeat(np.cumsum(counts[b]) - counts[b], counts[b])
        table[b, line * width + rank] = column
    return torch.from_numpy(table).as_strided(
        (len(rows), 1, N, M), (table.shape[1], table.shape[1], width, 1)
    )
