"""The backward kernels that own queries: delta, and dq in the deterministic mode.

The equations are those of `backward_keys`. Program (rank, kv_head, b) owns BLOCK_Q queries of one
head and walks the same lists of blocks as the forward kernel: dq_q = scale sum_k ds k, summed in
registers, in one order.
"""

import triton
import triton.language as tl

from flexmask_kernels.primitives import head_offset, load_rows, load_tile, sees, store_rows, tanh


@triton.jit(do_not_specialize=["L", "H"])
def delta_kernel(
    out_ptr,  # [B, H, L, D_V]
    dout_ptr,
    delta_ptr,  # fp32 [B, H, L]
    stride_ob,
    stride_oh,
    stride_dob,
    stride_doh,
    L,
    H,
    STRIDE_O: tl.constexpr,
    STRIDE_DO: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Compute delta_q = dout_q . out_q for BLOCK_Q queries; grid (ceil(L / BLOCK_Q), H, B)."""
    start, head, b = tl.program_id(0) * BLOCK_Q, tl.program_id(1), tl.program_id(2)
    out_ptr += head_offset(b, head, stride_ob, stride_oh)
    dout_ptr += head_offset(b, head, stride_dob, stride_doh)
    out = load_rows(out_ptr, start, L, STRIDE_O, BLOCK_Q, D_V, BLOCK_D_V, True)
    dout = load_rows(dout_ptr, start, L, STRIDE_DO, BLOCK_Q, D_V, BLOCK_D_V, True)
    query = start + tl.arange(0, BLOCK_Q)
    delta_ptr += (tl.cast(b, tl.int64) * H + head) * L
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + query, delta, mask=query < L)


@triton.jit
def _add_gradients(
    dq,  # [BLOCK_Q, BLOCK_D] fp32, sum of ds k so far
    q,  # [BLOCK_Q, BLOCK_D]
    dout,  # [BLOCK_Q, BLOCK_D_V]
    lse2,  # [BLOCK_Q]
    delta,  # [BLOCK_Q]
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
    """Add the keys of `num_tiles` blocks."""
    tile = tl.load(tiles_ptr)
    for step in range(num_tiles):
        start = tile * BLOCK_K
        tile = tl.load(tiles_ptr + STEP * tl.minimum(step + 1, num_tiles - 1))
        k = load_tile(
            k_ptr, b, kv_head, start, L, STRIDE_K, BLOCK_K, D, BLOCK_D, IS_PARTIAL, USE_TMA
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        if HAS_SOFTCAP:
            s = tanh(s * before_tanh)
        p = tl.exp2(s * to_log2 - lse2[:, None])
        if IS_PARTIAL:
            key = start + tl.arange(0, BLOCK_K)
            end = tl.load(end_ptr + key, mask=key < L, other=0)
            visible = sees(
                query[:, None], key[None, :], end[None, :], window_start[:, None], HAS_WINDOW
            )
            p = tl.where(visible, p, 0.0)
        v = load_tile(
            v_ptr, b, kv_head, start, L, STRIDE_V, BLOCK_K, D_V, BLOCK_D_V, IS_PARTIAL, USE_TMA
        )
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - s * s)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if COUNT_TILES:
            tl.atomic_add(counter_ptr, 1)
    return dq


@triton.jit(do_not_specialize=["L", "H", "H_KV", "num_lines", "capacity", "num_rows"])
def backward_queries_kernel(
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, H_KV, L, D], like the next one; a descriptor with USE_TMA
    v_ptr,  # [B, H_KV, L, D_V]
    dout_ptr,  # [B, H, L, D_V]
    lse2_ptr,  # fp32 [B, H, L]
    delta_ptr,  # fp32 [B, H, L]
    dq_ptr,  # [B, H, L, D]
    end_ptr,  # int32 [num_rows, L]
    start_ptr,  # int32 [num_rows, L]; None without a window
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
    stride_dob,
    stride_doh,
    stride_dqb,
    stride_dqh,
    stride_dq,
    L,
    H,
    H_KV,
    num_lines,
    capacity,
    num_rows,
    scale,
    before_tanh,
    to_log2,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_DO: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Compute BLOCK_Q rows of dq; grid (num_lines * H / H_KV, H_KV, B)."""
    group = H // H_KV
    kv_head, b = tl.program_id(1), tl.program_id(2)
    head = kv_head * group + tl.program_id(0) % group
    row = tl.minimum(b, num_rows - 1)
    line = tl.load(order_ptr + row * num_lines + tl.program_id(0) // group)
    start = line * BLOCK_Q

    q_ptr += head_offset(b, head, stride_qb, stride_qh)
    if not USE_TMA:
        k_ptr += head_offset(b, kv_head, stride_kb, stride_kh)
        v_ptr += head_offset(b, kv_head, stride_vb, stride_vh)
    dout_ptr += head_offset(b, head, stride_dob, stride_doh)
    end_ptr += tl.cast(row, tl.int64) * L
    plan_ptr += (row * num_lines + line) * 4
    tiles_ptr += tl.cast(row * num_lines + line, tl.int64) * capacity
    num_full, num_partial = tl.load(plan_ptr), tl.load(plan_ptr + 1)

    query = start + tl.arange(0, BLOCK_Q)
    window_start = query
    if HAS_WINDOW:
        start_ptr += tl.cast(row, tl.int64) * L
        window_start = tl.load(start_ptr + query, mask=query < L, other=0)
    q = load_rows(q_ptr, start, L, STRIDE_Q, BLOCK_Q, D, BLOCK_D, True)
    dout = load_rows(dout_ptr, start, L, STRIDE_DO, BLOCK_Q, D_V, BLOCK_D_V, True)
    statistics = (tl.cast(b, tl.int64) * H + head) * L
    lse2 = tl.load(lse2_ptr + statistics + query, mask=query < L, other=0.0)
    delta = tl.load(delta_ptr + statistics + query, mask=query < L, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for IS_PARTIAL in tl.static_range(2):
        dq = _add_gradients(
            dq,
            q,
            dout,
            lse2,
            delta,
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
    dq_ptr += head_offset(b, head, stride_dqb, stride_dqh)
    store_rows(dq_ptr, dq * scale, start, stride_dq, L, BLOCK_Q, D, BLOCK_D)
