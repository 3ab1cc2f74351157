"""What goes through a model: tokens and visible pairs, as far as each kind of layer sees.

On one path there is one token at each position, so the query at position p of a sample has

    min(p + 1, window, p mod chunk + 1)

visible keys in a layer with a window or chunk, whatever else is in the row: pairs follow from
positions alone. Tiles, which hold several branches, need the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from flexmask.backends.reach import position_floor
from flexmask.model.windows import FULL, Reach
from flexmask.tree.layout import lay_out
from flexmask.tree.tiles import tile_ranges
from flexmask.tree.tree import PrefixTree

TILE = 128  # tokens on a side, as FlexAttention has them by default


class Work(NamedTuple):
    """What goes through a model. The head sees every token.

    Attributes:
        num_tokens: tokens.
        num_pairs: visible pairs (q, k) in a layer without window and chunk.
        bounded: visible pairs in layers with one, by their reach.
    """

    num_tokens: int = 0
    num_pairs: int = 0
    bounded: Mapping[Reach, int] = {}

    def pairs(self, reach: Reach) -> int:
        """Visible pairs in a layer of this reach, which must have been counted."""
        return self.num_pairs if reach == FULL else self.bounded[reach]

    def plus(self, other: Work) -> Work:
        """The work of both; they count the same reaches, or one of them is empty."""
        reaches = self.bounded or other.bounded
        return Work(
            self.num_tokens + other.num_tokens,
            self.num_pairs + other.num_pairs,
            {reach: self.bounded.get(reach, 0) + other.bounded.get(reach, 0) for reach in reaches},
        )


def single_pass_work(tree: PrefixTree, reaches: Iterable[Reach] = ()) -> Work:
    """The work of one pass over a tree: every token sees its ancestors and itself, in reach."""
    starts, stops = tree.depths, tree.depths + tree.lengths
    bounded = {
        reach: int((pairs_before(stops, reach) - pairs_before(starts, reach)).sum())
        for reach in reaches
    }
    return Work(tree.num_tokens, tree.num_pairs, bounded)


def npass_work(lengths: Iterable[int], reaches: Iterable[Reach] = ()) -> Work:
    """The work of N-pass over samples of these lengths, packed end to end or not."""
    sizes = np.fromiter(lengths, np.int64)
    bounded = {reach: int(pairs_before(sizes, reach).sum()) for reach in reaches}
    return Work(int(sizes.sum()), int(pairs_before(sizes, FULL).sum()), bounded)


def pairs_before(stops: np.ndarray, reach: Reach) -> np.ndarray:
    """Visible pairs of the queries at positions [0, stop) of one path.

    Args:
        stops: int64 [n].
        reach: of the layer.

    >>> pairs_before(np.array([3, 10]), Reach(window=4))
    array([ 6, 34])
    """
    if reach.chunk is None:
        return _in_window(stops, reach.window)
    num_chunks, rest = np.divmod(stops, reach.chunk)
    whole = _in_window(np.array(reach.chunk), reach.window)
    return num_chunks * whole + _in_window(rest, reach.window)


def _in_window(stops: np.ndarray, window: int | None) -> np.ndarray:
    if window is None:
        return stops * (stops + 1) // 2
    within = np.minimum(stops, window)
    return within * (within + 1) // 2 + (stops - within) * window


def single_pass_tiled(tree: PrefixTree, reaches: Iterable[Reach] = ()) -> Work:
    """The work of one pass over a tree with all pairs of the tiles that kernels visit.

    With a window or chunk that is every tile whose highest key is not below its lowest floor.
    """
    row = lay_out(tree)
    tiles = tile_ranges(row.subtree_end, TILE, TILE)
    bounded = {}
    if reaches := tuple(reaches):
        query, key, _ = tiles.pairs()
        starts = np.arange(0, tree.num_tokens, TILE)
        highest = np.maximum.reduceat(row.position_ids, starts)
        for reach in reaches:
            lowest = np.minimum.reduceat(_floors(row.position_ids, reach), starts)
            bounded[reach] = int((highest[key] >= lowest[query]).sum()) * TILE**2
    return Work(tree.num_tokens, tiles.num_visited * TILE**2, bounded)


def npass_tiled(lengths: Iterable[int], reaches: Iterable[Reach] = ()) -> Work:
    """The same for N-pass, each sample in a row of its own."""
    sizes = np.fromiter(lengths, np.int64)
    num_blocks = -(-sizes // TILE)
    block = np.arange(num_blocks.sum()) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    bounded = {
        reach: int((block - _floors(block * TILE, reach).clip(0) // TILE + 1).sum()) * TILE**2
        for reach in reaches
    }
    return Work(int(sizes.sum()), int((block + 1).sum()) * TILE**2, bounded)


def _floors(positions: np.ndarray, reach: Reach) -> np.ndarray:
    """The lowest position that the queries at `positions` see, int64 [n]."""
    floor = position_floor(torch.from_numpy(positions), reach.window, reach.chunk)
    return np.zeros(positions.size, np.int64) if floor is None else floor.numpy().astype(np.int64)
