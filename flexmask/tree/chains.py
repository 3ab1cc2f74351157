"""A tree mask as a few dense rectangles, for attention on ordinary causal kernels.

A chain (heavy path) is a contiguous run of rows, each the parent of the next, so it ends at a leaf.
Its rows see a causal square on the chain itself, and one contiguous prefix of every chain that its
head descends from. Heavy-first order leaves O(log L) such prefixes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Slice(NamedTuple):
    """The rectangle of queries [q_start, q_stop) and keys [k_start, k_stop), in packed positions.

    `is_causal` marks the square of a chain on itself (q >= k inside it); all pairs of any other
    slice are visible.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    is_causal: bool


def chain_starts(end: np.ndarray) -> np.ndarray:
    """The packed positions where the chains of a row with subtree ends `end` [L] begin, ascending.

    A chain ends at every leaf, and a leaf is a token whose subtree is itself alone.
    """
    is_leaf = end == np.arange(1, end.size + 1)
    return np.concatenate(([0], np.flatnonzero(is_leaf)[:-1] + 1))


def mask_slices(end: np.ndarray) -> list[Slice]:
    """The slices that cover each visible pair of `end` [L] exactly once, chain by chain.

    Each chain's causal square comes first, then its prefixes from the nearest ancestor outwards.
    """
    starts = chain_starts(end).tolist()
    stops = [*starts[1:], end.size]
    slices: list[Slice] = []
    open_chains: list[
        tuple[int, int]
    ] = []  # (chain start, number of its tokens that are ancestors)
    previous: tuple[int, int] | None = None
    for start, stop in zip(starts, stops, strict=True):
        if previous is not None:
            open_chains.append(previous)
        # An ancestor chain counts as long as its subtree ends shrink towards its leaf: its tokens
        # that see `start` are a prefix, found by bisection on the descending ends.
        ancestors: list[tuple[int, int]] = []
        for chain_start, chain_stop in open_chains:
            seen = num_ends_above(end, chain_start, chain_stop, start)
            if seen:
                ancestors.append((chain_start, chain_start + seen))
        open_chains = ancestors
        slices.append(Slice(start, stop, start, stop, True))
        slices.extend(Slice(start, stop, k0, k1, False) for k0, k1 in reversed(ancestors))
        previous = (start, stop)
    return slices


def num_ends_above(end: np.ndarray, start: int, stop: int, position: int) -> int:
    """How many of the descending values end[start:stop] are greater than `position`."""
    ascending = end[start:stop][::-1]
    return ascending.size - int(np.searchsorted(ascending, position, side="right"))
