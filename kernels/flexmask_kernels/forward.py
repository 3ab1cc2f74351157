"""The forward kernel.

For query q of head h, over the keys k that it sees (FlashAttention-2, arXiv 2307.08691, alg. 1):

    t_k = scale q.k,  or softcap tanh(scale q.k / softcap)
    lse = log(sum_k exp(t_k) + exp(sink_h)),    out_q = sum_k exp(t_k - lse) v_k

Program (rank, kv_head, b) owns BLOCK_Q queries of one head: their scores, their running maximum and
sum, and BLOCK_Q rows of the output. It visits its full tiles first, without mask code, then its
partial ones. Programs of one key head are neighbours in launch order, block after block from the
longest list to the shortest, heads of a group within a block: the keys and values that run at one
time belong to one key head, so that they stay in the L2 cache, and no long program starts last.

A padding query (beyond L, in a ragged last block) sees no key and is not stored.
"""

import triton
import triton.language as tl

from flexmask_kernels.primitives import (
    LOG2E,
    head_offset,
    load_rows,
    load_tile,
    sees,
    softmax_step,
    store_rows,
    tanh,
)


@triton.jit
def _attend(
    acc,  # [BLOCK_Q, BLOCK_D_V] fp32, sum of p v so far
    m,  # [BLOCK_Q], highest score so far in base 2
    total,  # [BLOCK_Q], sum of p so far
    q,  # [BLOCK_Q, BLOCK_D]
    query,  # int32 [BLOCK_Q], index in the row
    window_start,  # int32 [BLOCK_Q], first key seen
    k_ptr,
    v_ptr,
    b,
    kv_head,
    end_ptr,
    tiles_ptr,  # first tile to visit
    num_tiles,
    counter_ptr,
    L,
    before_tanh,
    to_log2,
    STEP: tl.constexpr,  # from one tile of the list to the next
    IS_PARTIAL: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Add the keys of `num_tiles` blocks to the running softmax."""
    tile = tl.load(tiles_ptr)
    for step in range(num_tiles):
        start = tile * BLOCK_K
        # the index of the next tile is loaded a step ahead: no load waits for another
        tile = tl.load(tiles_ptr + STEP * tl.minimum(step + 1, num_tiles - 1))
        k = load_tile(
            k_ptr, b, kv_head, start, L, STRIDE_K, BLOCK_K, D, BLOCK_D, IS_PARTIAL, USE_TMA
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        if HAS_SOFTCAP:
            s = tanh(s * before_tanh)
        if IS_PARTIAL:
            key = start + tl.arange(0, BLOCK_K)
            end = tl.load(end_ptr + key, mask=key < L, other=0)
            visible = sees(
                query[:, None], key[None, :], end[None, :], window_start[:, None], HAS_WINDOW
            )
            s = tl.where(visible, s, float("-inf"))
        p, m, total, shrink = softmax_step(s, m, total, to_log2, IS_PARTIAL)
        v = load_tile(
            v_ptr, b, kv_head, start, L, STRIDE_V, BLOCK_K, D_V, BLOCK_D_V, IS_PARTIAL, USE_TMA
        )
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        if COUNT_TILES:
            tl.atomic_add(counter_ptr, 1)
    return acc, m, total


@triton.jit(do_not_specialize=["L", "H", "H_KV", "num_lines", "capacity", "num_rows"])
def forward_kernel(
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, H_KV, L, D], like the next one; a descriptor with USE_TMA
    v_ptr,  # [B, H_KV, L, D_V]
    out_ptr,  # [B, H, L, D_V]
    lse2_ptr,  # fp32 [B, H, L]
    end_ptr,  # int32 [num_rows, L]
    start_ptr,  # int32 [num_rows, L]; None without a window
    sink_ptr,  # fp32 [H], or None without sinks
    plan_ptr,  # as in `planning.Plan`, like the next two; lines are blocks of queries
    tiles_ptr,
    order_ptr,
    counter_ptr,  # int32 [2], full and partial tiles visited; or None without COUNT_TILES
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_ob,
    stride_oh,
    stride_o,
    L,
    H,
    H_KV,
    num_lines,
    capacity,
    num_rows,
    before_tanh,
    to_log2,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Compute BLOCK_Q rows of the output; grid (num_lines * H / H_KV, H_KV, B)."""
    group = H // H_KV
    kv_head, b = tl.program_id(1), tl.program_id(2)
    head = kv_head * group + tl.program_id(0) % group
    row = tl.minimum(b, num_rows - 1)
    line = tl.load(order_ptr + row * num_lines + tl.program_id(0) // group)

    q_ptr += head_offset(b, head, stride_qb, stride_qh)
    if not USE_TMA:
        k_ptr += head_offset(b, kv_head, stride_kb, stride_kh)
        v_ptr += head_offset(b, kv_head, stride_vb, stride_vh)
    end_ptr += tl.cast(row, tl.int64) * L
    plan_ptr += (row * num_lines + line) * 4
    tiles_ptr += tl.cast(row * num_lines + line, tl.int64) * capacity
    num_full, num_partial = tl.load(plan_ptr), tl.load(plan_ptr + 1)

    query = line * BLOCK_Q + tl.arange(0, BLOCK_Q)
    window_start = query
    if HAS_WINDOW:
        start_ptr += tl.cast(row, tl.int64) * L
        window_start = tl.load(start_ptr + query, mask=query < L, other=0)
    q = load_rows(q_ptr, line * BLOCK_Q, L, STRIDE_Q, BLOCK_Q, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_Q, BLOCK_D_V], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for IS_PARTIAL in tl.static_range(2):
        acc, m, total = _attend(
            acc,
            m,
            total,
            q,
            query,
            window_start,
            k_ptr,
            v_ptr,
            b,
            kv_head,
            end_ptr,
            tiles_ptr + (capacity - 1) * IS_PARTIAL,
            num_partial if IS_PARTIAL else num_full,
            counter_ptr + IS_PARTIAL if COUNT_TILES else None,
            L,
            before_tanh,
            to_log2,
            STEP=1 - 2 * IS_PARTIAL,
            IS_PARTIAL=IS_PARTIAL,
            STRIDE_K=STRIDE_K,
            STRIDE_V=STRIDE_V,
            D=D,
            D_V=D_V,
            BLOCK_D=BLOCK_D,
            BLOCK_D_V=BLOCK_D_V,
            BLOCK_K=BLOCK_K,
            HAS_SOFTCAP=HAS_SOFTCAP,
            HAS_WINDOW=HAS_WINDOW,
            PRECISION=PRECISION,
            COUNT_TILES=COUNT_TILES,
            USE_TMA=USE_TMA,
        )
    if HAS_SINKS:
        sink = tl.load(sink_ptr + head) * LOG2E
        highest = tl.maximum(m, sink)
        shrink = tl.exp2(m - highest)
        total = total * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
        m = highest
    total = tl.where(query < L, total, 1.0)
    lse2_ptr += (tl.cast(b, tl.int64) * H + head) * L
    tl.store(lse2_ptr + query, m + tl.log2(total), mask=query < L)
    out_ptr += head_offset(b, head, stride_ob, stride_oh)
    out = acc / total[:, None]
    store_rows(out_ptr, out, line * BLOCK_Q, stride_o, L, BLOCK_Q, D_V, BLOCK_D_V)
