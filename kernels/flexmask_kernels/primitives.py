"""What several kernels share: loads and stores of rows, scores, the mask, the online softmax.

A query q sees a key k where k <= q < end[k] and, with a window, start[q] <= k.
Scores live in base 2, because exp2 is one instruction: with t = softcap * tanh(scale q.k / softcap)
(or t = scale q.k), every kernel computes

    tanh_or_dot * TO_LOG2 = t * log2(e),    p = exp2(t * log2(e) - lse2),    lse2 = log2 sum exp(t)

so that the factor is one fused multiply-add per pair. Scores [rows, columns] are fp32 throughout.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    base_ptr,  # of one head, [L, WIDTH] with unit stride in a row
    start,
    L,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    IS_RAGGED: tl.constexpr,
):
    """Rows [start, start + BLOCK) as [BLOCK, BLOCK_WIDTH], zero outside of [L, WIDTH].

    STRIDE is from row to row. It is a constant, so that the rows of one thread are at constant
    distances, and one pointer serves them all.
    """
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    offset = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    ptr = base_ptr + tl.cast(start, tl.int64) * STRIDE + offset
    if IS_RAGGED:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(ptr, mask=start + row[:, None] < L, other=0.0)
        else:
            inside = (start + row[:, None] < L) & (column[None, :] < WIDTH)
            tile = tl.load(ptr, mask=inside, other=0.0)
    else:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(ptr)
        else:
            tile = tl.load(ptr, mask=column[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def load_tile(
    base,  # as in `load_rows`; with USE_TMA a descriptor of [B, heads, L, WIDTH]
    b,
    head,
    start,
    L,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Rows [start, start + BLOCK) of a head as [BLOCK, BLOCK_WIDTH], zero outside of [L, WIDTH]."""
    if USE_TMA:
        tile = base.load([b, head, start, 0]).reshape(BLOCK, BLOCK_WIDTH)
    else:
        tile = load_rows(base, start, L, STRIDE, BLOCK, WIDTH, BLOCK_WIDTH, IS_RAGGED)
    return tile


@triton.jit
def add_rows(
    base_ptr,  # fp32, of one head, [L, WIDTH] with unit stride in a row
    tile,
    start,
    L,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    IS_RAGGED: tl.constexpr,
):
    """Add `tile` [BLOCK, BLOCK_WIDTH] to rows [start, start + BLOCK) atomically, in any order."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    offset = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    ptr = base_ptr + tl.cast(start, tl.int64) * STRIDE + offset
    if IS_RAGGED:
        inside = (start + row[:, None] < L) & (column[None, :] < WIDTH)
        tl.atomic_add(ptr, tile, mask=inside, sem="relaxed")
    else:
        if WIDTH == BLOCK_WIDTH:
            tl.atomic_add(ptr, tile, sem="relaxed")
        else:
            tl.atomic_add(ptr, tile, mask=column[None, :] < WIDTH, sem="relaxed")


@triton.jit
def store_rows(
    base_ptr,  # of one head, [L, WIDTH] with unit stride in a row
    tile,
    start,
    stride,
    L,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Store `tile` [BLOCK, BLOCK_WIDTH] to rows [start, start + BLOCK), clipped to [L, WIDTH]."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    ptr = base_ptr + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = (start + row[:, None] < L) & (column[None, :] < WIDTH)
    tl.store(ptr, tile.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def head_offset(b, head, stride_b, stride_h):
    """Elements before head `head` of batch row `b`, int64."""
    return tl.cast(b, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def tanh(x):
    """The hyperbolic tangent to fp32 rounding; the hardware's own keeps 11 bits."""
    shrunk = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    bent = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -bent, bent)


@triton.jit
def sees(
    query,  # int32 [.., ..], one of the two is a column and the other a line
    key,
    end,  # of the keys
    window_start,  # of the queries
    HAS_WINDOW: tl.constexpr,
):
    """The mask of one tile; the only mask code there is, and only partial tiles run it."""
    visible = (key <= query) & (query < end)
    if HAS_WINDOW:
        visible = visible & (window_start <= key)
    return visible


@triton.jit
def softmax_step(s, m, total, to_log2, IS_PARTIAL: tl.constexpr):
    """One step of the online softmax (Milakov & Gimelshein, arXiv 1805.02867, algorithm 3).

        m' = max(m, max_k s_k),  p_k = exp2(s_k - m'),  total' = total * exp2(m - m') + sum_k p_k

    Args:
        s: scores [BLOCK_Q, BLOCK_K] before `to_log2`; -inf where the mask hides the key.
        m: highest score so far [BLOCK_Q], in base 2; -inf before the first.
        total: sum of exp2(score - m) so far [BLOCK_Q].
        to_log2: factor from s to base 2; positive.
        IS_PARTIAL: a query may see no key yet, so that m' may still be -inf.

    Returns:
        p [BLOCK_Q, BLOCK_K], m', total', and exp2(m - m') [BLOCK_Q] to rescale sums with.
    """
    highest = tl.maximum(m, tl.max(s, 1) * to_log2)
    base = highest
    if IS_PARTIAL:
        base = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(s * to_log2 - base[:, None])
    shrink = tl.exp2(m - base)
    return p, highest, total * shrink + tl.sum(p, 1), shrink
