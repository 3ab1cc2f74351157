"""The interval form of a tree mask: two integers a token.

In depth-first preorder the subtree of token k is the contiguous range [k, end[k]), and the tokens
of a path stand in the row in their order on the path. So

    visible(q, k)  =  start[q] <= k <= q < end[k],

where start[q] is the first token of its path that q sees: 0 without a limit, otherwise its ancestor
at the lowest position in its window or chunk. Everything else about the mask (tiles, slices,
density) is arithmetic on `end` and `start`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flexmask.errors import MaskError
from flexmask.tree.tree import is_count

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(subtree_end: Tensor, window_start: Tensor | None = None) -> MaskMod:
    """The mask as FlexAttention's callable (b, h, q_idx, kv_idx) -> bool tensor.

    Args:
        subtree_end: int32 [B, L].
        window_start: int32 [B, L], see `find_window_start`; None for no limit.
    """

    def tree_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start = None if window_start is None else window_start[b, q_idx]
        return _sees(q_idx, kv_idx, subtree_end[b, kv_idx], start)

    return tree_mask


def flat_mask_mod(subtree_end: Tensor, window_start: Tensor | None = None) -> MaskMod:
    """`mask_mod` with a single index into memory: of one row, the token's own."""
    B, L = subtree_end.shape
    first = torch.arange(0, B * L, L, dtype=torch.int32, device=subtree_end.device)
    ends = subtree_end.reshape(-1)
    starts = None if window_start is None else window_start.reshape(-1)

    def tree_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key, query = (kv_idx, q_idx) if B == 1 else (first[b] + kv_idx, first[b] + q_idx)
        return _sees(q_idx, kv_idx, ends[key], None if starts is None else starts[query])

    return tree_mask


def _sees(query: Tensor, key: Tensor, end: Tensor, start: Tensor | None) -> Tensor:
    """Whether a query sees a key, by the key's subtree end and the query's window start."""
    visible = (key <= query) & (query < end)
    return visible if start is None else visible & (key >= start)


def dense_mask(subtree_end: Tensor, window_start: Tensor | None = None) -> Tensor:
    """The mask as bool [B, L, L]: True where the query (second dimension) sees the key (third)."""
    B, L = subtree_end.shape
    row, index = (torch.arange(size, device=subtree_end.device) for size in (B, L))
    visible = mask_mod(subtree_end, window_start)
    return visible(row[:, None, None], row, index[:, None], index[None, :])


def find_window_start(
    subtree_end: Tensor, *, window: int | None = None, chunk: int | None = None
) -> Tensor | None:
    """The first token that each query sees, int32 [B, L]; None for no limit.

    A window of w positions begins w - 1 positions before the query, a chunk of c positions (the
    local attention of llama4) at the last multiple of c. Both count positions in the sample, which
    are depths in the tree, so a branch sees exactly what it sees in a separate sequence.

    Args:
        subtree_end: int [B, L]; the depths follow from it.
        window: a query sees keys less than `window` positions before it, or None.
        chunk: a query sees keys of its own chunk of `chunk` positions, or None.

    >>> find_window_start(torch.tensor([[5, 5, 3, 5, 5]]), window=2).tolist()
    [[0, 0, 1, 1, 3]]
    """
    if window is None and chunk is None:
        return None
    return _window_start(subtree_end, window, chunk)


@torch.library.custom_op("flexmask::window_start", mutates_args=())  # one node for a compiler
def _window_start(subtree_end: Tensor, window: int | None, chunk: int | None) -> Tensor:
    B, L = subtree_end.shape
    index = torch.arange(L, device=subtree_end.device).expand(B, L).contiguous()
    closed = torch.searchsorted(subtree_end.long().sort().values, index, right=True)
    depth = index - closed
    lowest = torch.zeros_like(depth)
    if window is not None:
        lowest = lowest.maximum(depth - (window - 1))
    if chunk is not None:
        lowest = lowest.maximum(depth - depth % chunk)
    # Of the tokens of one depth, the last one up to the query is on its path.
    by_depth = (depth * L + index).sort().values
    found = torch.searchsorted(by_depth, lowest * L + index, right=True) - 1
    return (by_depth.gather(1, found) % L).int()


@_window_start.register_fake
def _(subtree_end, window, chunk):
    return subtree_end.new_empty(subtree_end.shape, dtype=torch.int32)


def find_depths(end: np.ndarray) -> np.ndarray:
    """The depth of each token of a row with subtree ends `end` [L]: the number of its ancestors.

    Of the q tokens before q, these are the ones whose subtree is still open.
    """
    closed = np.cumsum(np.bincount(end, minlength=end.size + 1)[: end.size])
    return np.arange(end.size) - closed


def find_parents(end: np.ndarray) -> np.ndarray:
    """The token before each token of a row on its path, int64 [L]; -1 at a root.

    Args:
        end: subtree ends [L].
    """
    start = _window_start(torch.tensor(end)[None], 2, None)[0].numpy()
    return np.where(start == np.arange(end.size), -1, start)  # a root sees itself alone


def check_window(window: int | None, chunk: int | None) -> None:
    """Raise MaskError unless each is an integer of at least 1, or None."""
    for name, size in (("window", window), ("chunk", chunk)):
        if size is not None and not is_count(size):
            raise MaskError(
                f"{name} must be an integer of at least 1, got {size!r}; leave it out for none"
            )


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
    """Raise MaskError unless each token's position is its depth, which `end` [L] says.

    A token that is alone in its tree, as padding is, may have any position: it sees no other.
    O(L) time.
    """
    depth = find_depths(end)
    is_alone = (depth == 0) & (end == np.arange(1, end.size + 1))
    wrong = np.flatnonzero((position_ids != depth) & ~is_alone)
    if wrong.size:
        q = int(wrong[0])
        raise MaskError(
            f"position_ids[{q}] must be {depth[q]}, the number of tokens that token {q} sees "
            f"before itself by subtree_end, got {position_ids[q]}; take both from TreeCollator, "
            "PackedRow.to_batch or compile_mask"
        )
