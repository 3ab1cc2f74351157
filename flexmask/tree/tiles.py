"""Which tiles of the mask are empty, partial or full, from two integers per key block.

The keys of block j are consecutive, each sees itself, so the union of their ranges [k, end[k]) is
one range from the block's first key to max(end), and the intersection one range from its last key
to min(end). Rounding both to query blocks gives every tile its class without looking at pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexmask.errors import MaskError


@dataclass(frozen=True, slots=True)
class TileRanges:
    """For each block of keys, the query blocks that see some and all of it; half-open ranges.

    Attributes:
        first, last: int64 [num_k_blocks]; query blocks in [first, last) see at least one key.
        full_first, full_last: int64 [num_k_blocks]; query blocks in [full_first, full_last) lie
            wholly inside the row and see every key. Empty ranges have full_first == full_last.
        block_q, block_k: tile size in tokens.
        num_q_blocks: number of query blocks, the ragged last one included.

    A ragged last block of keys or queries is never full, as in `create_block_mask`.
    """

    first: np.ndarray
    last: np.ndarray
    full_first: np.ndarray
    full_last: np.ndarray
    block_q: int
    block_k: int
    num_q_blocks: int

    @property
    def num_visited(self) -> int:
        """Number of tiles that hold at least one visible pair."""
        return int((self.last - self.first).sum())

    @property
    def num_full(self) -> int:
        """Number of tiles that need no mask at all."""
        return int((self.full_last - self.full_first).sum())

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The visited tiles as (query block, key block, is_full), sorted by key block, then query.

        O(visited tiles) time and memory.
        """
        counts = self.last - self.first
        key_block = np.repeat(np.arange(counts.size), counts)
        offset = np.arange(key_block.size) - np.repeat(np.cumsum(counts) - counts, counts)
        query_block = offset + self.first[key_block]
        is_full = (self.full_first[key_block] <= query_block) & (
            query_block < self.full_last[key_block]
        )
        return query_block, key_block, is_full


def tile_ranges(end: np.ndarray, block_q: int, block_k: int) -> TileRanges:
    """The tile ranges of a row with subtree ends `end` [L], in O(L) time.

    Raises:
        MaskError: a block size below 1.
    """
    if block_q < 1 or block_k < 1:
        raise MaskError(f"block sizes must be at least 1, got {block_q} x {block_k}")
    first_key = np.arange(0, end.size, block_k)
    last_key = first_key + block_k - 1
    highest = np.maximum.reduceat(end, first_key).astype(np.int64)
    lowest = np.minimum.reduceat(end, first_key).astype(np.int64)
    full_first = -(-last_key // block_q)
    full_last = np.where(last_key < end.size, lowest // block_q, 0)
    return TileRanges(
        first=first_key // block_q,
        last=-(-highest // block_q),
        full_first=full_first,
        full_last=np.maximum(full_first, full_last),
        block_q=block_q,
        block_k=block_k,
        num_q_blocks=-(-end.size // block_q),
    )
