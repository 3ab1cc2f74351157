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

from flexmask.model.windows import FULL, Window
from flexmask.tree.intervals import find_window_start
from flexmask.tree.layout import lay_out
from flexmask.tree.tiles import tiles_of_rows
from flexmask.tree.tree import PrefixTree

TILE = 128  # tokens on a side, as FlexAttention has them by default


class Work(NamedTuple):
    """What goes through a model. The head sees every token.

    Attributes:
        num_tokens: tokens.
        num_pairs: visible pairs (q, k) in a layer without window and chunk.
        bounded: visible pairs in layers with one, by their window.
    """

    num_tokens: int = 0
    num_pairs: int = 0
    bounded: Mapping[Window, int] = {}

    def pairs(self, window: Window) -> int:
        """Visible pairs in a layer of this window, which must have been counted."""
        return self.num_pairs if window == FULL else self.bounded[window]

    def plus(self, other: Work) -> Work:
        """The work of both; they count the same windows, or one of them is empty."""
        windows = self.bounded or other.bounded
        return Work(
            self.num_tokens + other.num_tokens,
            self.num_pairs + other.num_pairs,
            {
                window: self.bounded.get(window, 0) + other.bounded.get(window, 0)
                for window in windows
            },
        )


def single_pass_work(tree: PrefixTree, windows: Iterable[Window] = ()) -> Work:
    """The work of one pass over a tree: every token sees its ancestors and itself, in window."""
    starts, stops = tree.depths, tree.depths + tree.lengths
    bounded = {
        window: int((pairs_before(stops, window) - pairs_before(starts, window)).sum())
        for window in windows
    }
    return Work(tree.num_tokens, tree.num_pairs, bounded)


def npass_work(lengths: Iterable[int], windows: Iterable[Window] = ()) -> Work:
    """The work of N-pass over samples of these lengths, packed end to end or not."""
    sizes = np.fromiter(lengths, np.int64)
    bounded = {window: int(pairs_before(sizes, window).sum()) for window in windows}
    return Work(int(sizes.sum()), int(pairs_before(sizes, FULL).sum()), bounded)


def pairs_before(stops: np.ndarray, window: Window) -> np.ndarray:
    """Visible pairs of the queries at positions [0, stop) of one path.

    Args:
        stops: int64 [n].
        window: of the layer.

    >>> pairs_before(np.array([3, 10]), Window(window=4))
    array([ 6, 34])
    """
    if window.chunk is None:
        return _in_window(stops, window.window)
    num_chunks, rest = np.divmod(stops, window.chunk)
    whole = _in_window(np.array(window.chunk), window.window)
    return num_chunks * whole + _in_window(rest, window.window)


def _in_window(stops: np.ndarray, window: int | None) -> np.ndarray:
    if window is None:
        return stops * (stops + 1) // 2
    within = np.minimum(stops, window)
    return within * (within + 1) // 2 + (stops - within) * window


def single_pass_tiled(tree: PrefixTree, windows: Iterable[Window] = ()) -> Work:
    """The work of one pass over a tree with all pairs of the tiles that kernels visit."""
    return _tiled([lay_out(tree).subtree_end], windows)


def npass_tiled(lengths: Iterable[int], windows: Iterable[Window] = ()) -> Work:
    """The same for N-pass, each sample in a row of its own."""
    return _tiled((np.full(length, length, np.int32) for length in lengths), windows)


def _tiled(ends: Iterable[np.ndarray], windows: Iterable[Window]) -> Work:
    """The work of rows with these subtree ends."""
    num_tokens, pairs = 0, dict.fromkeys((FULL, *windows), 0)
    for end in ends:
        num_tokens += end.size
        row = torch.from_numpy(end)[None]
        for kind in pairs:
            start = find_window_start(row, **kind._asdict())
            (tiles,) = tiles_of_rows(row, start, TILE, TILE)
            pairs[kind] += tiles.num_visited * TILE**2
    return Work(num_tokens, pairs.pop(FULL), pairs)
