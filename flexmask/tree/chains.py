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


def find_ancestors(end: np.ndarray, token: int, root: int = 0) -> np.ndarray:
    """The tokens of [root, token) that `token` sees, ascending."""
    return root + np.flatnonzero(end[root:token] > token)


def mask_slices(end: np.ndarray) -> list[Slice]:
    """The slices that cover each visible pair of `end` [L] exactly once, chain by chain.

    Each chain's causal square comes first, then its prefixes from the nearest ancestor outwards.
    """
    slices = []
    starts = chain_starts(end)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), end.size], strict=True):
        slices.append(Slice(start, stop, start, stop, True))
        ancestors = find_ancestors(end, start)
        runs = np.split(ancestors, np.flatnonzero(np.diff(ancestors) > 1) + 1)
        slices.extend(
            Slice(start, stop, int(run[0]), int(run[-1]) + 1, False)
            for run in reversed(runs)
            if run.size
        )
    return slices
