"""The interval form of a tree mask: one integer per token.

In depth-first preorder the subtree of token k is the contiguous range [k, end[k]), so

    visible(q, k) = k <= q < end[k].

Everything else about the mask (tiles, slices, density) is arithmetic on `end`.
"""

from __future__ import annotations

import numpy as np

from flexmask.errors import MaskError


def check_subtree_end(end: np.ndarray) -> None:
    """Raise MaskError unless `end` [L] holds the subtree ends of a forest in preorder.

    The rule: k < end[k] <= L, and the ranges [k, end[k]) are nested or disjoint. O(L) time.
    """
    index = np.arange(end.size)
    outside = np.flatnonzero((end <= index) | (end > end.size))
    if outside.size:
        k = int(outside[0])
        raise MaskError(
            f"subtree_end[{k}] must be in [{k + 1}, {end.size}], got {end[k]}; "
            "a token always sees itself, and no subtree leaves its row"
        )
    # Tokens of one unary run share their end; walking the runs with a stack checks the nesting.
    starts = np.flatnonzero(np.diff(end, prepend=-1))
    open_ends: list[int] = []
    for start, stop in zip(starts.tolist(), end[starts].tolist(), strict=True):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if open_ends and stop > open_ends[-1]:
            raise MaskError(
                f"subtree_end[{start}] = {stop} crosses the end {open_ends[-1]} of a subtree that "
                "holds it; lay the tree out depth-first"
            )
        open_ends.append(stop)


def check_position_ids(end: np.ndarray, position_ids: np.ndarray) -> None:
    """Raise MaskError unless each token's position is its depth: the number of its ancestors.

    `end` [L] says how many these are: of the q tokens before q, those whose subtree is still open.
    A token that is alone in its tree, as padding is, may have any position: it sees no other.
    O(L) time.
    """
    closed = np.cumsum(np.bincount(end, minlength=end.size + 1))[: end.size]
    index = np.arange(end.size)
    depth = index - closed
    is_alone = (depth == 0) & (end == index + 1)
    wrong = np.flatnonzero((position_ids != depth) & ~is_alone)
    if wrong.size:
        q = int(wrong[0])
        raise MaskError(
            f"position_ids[{q}] must be {depth[q]}, the number of tokens that token {q} sees "
            f"before itself by subtree_end, got {position_ids[q]}; take both from TreeCollator, "
            "PackedRow.to_batch or compile_mask"
        )


def count_visible(end: np.ndarray) -> int:
    """The number of visible pairs (q, k) of a row with subtree ends `end` [L]."""
    return int((end.astype(np.int64) - np.arange(end.size)).sum())


def is_visible(end: np.ndarray) -> np.ndarray:
    """The dense mask, bool [L, L], that `end` [L] stands for; for tests and pictures only."""
    index = np.arange(end.size)
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
