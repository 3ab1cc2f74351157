"""Which tiles of the mask are empty, partial or full, from a few integers per block.

The keys of block j are consecutive, each sees itself, so the union of their ranges [k, end[k]) is
one range from the block's first key to max(end), and the intersection one range from its last key
to min(end). Rounding both to query blocks gives every tile its class without looking at pairs.

With a window, a query q below max(end) has an ancestor in block j, and its visible keys are those
from start[q] on: it sees one of the block where start[q] lies before the block's end, and all of
them where it lies not behind the block's begin. The lowest start of a block's queries below each
place, and the highest of all, say so for the whole tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flexmask.errors import MaskError
from flexmask.tree.tree import is_count


@dataclass(frozen=True, eq=False, slots=True)
class Tiles:
    """The tiles of a row that hold a visible pair, sorted by key block, then by query block.

    Attributes:
        query, key: int64 [n]; block of queries and block of keys of each tile.
        is_full: bool [n]; whether all pairs of the tile are visible. A ragged last block of keys or
            queries is never full, as in `create_block_mask`.
        num_q_blocks, num_k_blocks: number of blocks, the ragged last one included.
    """

    query: np.ndarray
    key: np.ndarray
    is_full: np.ndarray
    num_q_blocks: int
    num_k_blocks: int

    @property
    def num_visited(self) -> int:
        """Number of tiles that hold at least one visible pair."""
        return self.is_full.size

    @property
    def num_full(self) -> int:
        """Number of tiles that need no mask at all."""
        return int(self.is_full.sum())


def tiles_of_rows(
    subtree_end: Tensor, window_start: Tensor | None, block_q: int, block_k: int
) -> tuple[Tiles, ...]:
    """The tiles of each row of a mask by `find_tiles`; both tensors are int [B, L]."""
    starts = [None] * len(subtree_end) if window_start is None else window_start.cpu().numpy()
    rows = zip(subtree_end.cpu().numpy(), starts, strict=True)
    return tuple(find_tiles(end, start, block_q, block_k) for end, start in rows)


def find_tiles(end: np.ndarray, start: np.ndarray | None, block_q: int, block_k: int) -> Tiles:
    """The tiles of one row, in O(L) time plus O(tiles without the window).

    Args:
        end: subtree ends [L].
        start: the first token that each query sees [L], or None for no limit.
        block_q: queries of a tile.
        block_k: keys of a tile.

    Raises:
        MaskError: a block size that is no integer of at least 1.
    """
    if not (is_count(block_q) and is_count(block_k)):
        raise MaskError(
            f"block sizes must be integers of at least 1, got {block_q!r} for queries and "
            f"{block_k!r} for keys"
        )
    first_key = np.arange(0, end.size, block_k)
    last_key = first_key + block_k - 1
    highest = np.maximum.reduceat(end, first_key).astype(np.int64)
    lowest = np.minimum.reduceat(end, first_key).astype(np.int64)
    lowest[last_key >= end.size] = 0
    first, last = first_key // block_q, -(-highest // block_q)
    counts = last - first
    key = np.repeat(np.arange(counts.size), counts)
    query = np.arange(key.size) - np.repeat(np.cumsum(counts) - counts - first, counts)
    is_full = (last_key[key] <= query * block_q) & ((query + 1) * block_q <= lowest[key])
    if start is not None:
        starts = np.pad(start, (0, -end.size % block_q), mode="edge").reshape(-1, block_q)
        below = np.minimum(highest[key] - query * block_q, block_q)  # queries below max(end)
        lowest_start = np.minimum.accumulate(starts, axis=1)[query, below - 1]
        is_visited = lowest_start <= last_key[key]
        is_full &= starts.max(axis=1)[query] <= first_key[key]
        query, key, is_full = query[is_visited], key[is_visited], is_full[is_visited]
    return Tiles(query, key, is_full, -(-end.size // block_q), counts.size)
