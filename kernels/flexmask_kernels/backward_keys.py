"""The backward kernel that owns keys: dk and dv, and in the fast mode dq as well.

With P = exp(t - lse), delta_q = dout_q . out_q and s = q.k (FlashAttention-2, arXiv 2307.08691,
alg. 2):

    dv_k = sum_q P dout_q            dP = dout_q . v_k        dt = P (dP - delta_q)
    ds   = dt (1 - tanh(scale s / softcap)^2)                 (the bracket only with a softcap)
    dk_k = scale sum_q ds q          dq_q = scale sum_k ds k

Program (rank, kv_head, b) owns BLOCK_K keys of one key head and a share of its group's query heads:
it holds their keys and values, and the sums dk and dv in fp32. Everything is transposed,
[BLOCK_K, BLOCK_Q], so that P and ds are left operands, which the tensor cores take from registers.
The statistics of queries are lines then, many registers in each thread, so the sums of the products
start from them: q.k from -lse, dP from -delta.

The deterministic mode splits a group's heads over `num_splits` programs, more of them where there
are few blocks of keys. Each split writes its own dk and dv, [B, H_KV * num_splits, L, D], and the
launcher adds them up. dq is computed by `backward_queries`. Nothing depends on the order of
programs, and no program walks all heads of a group while others idle. These programs are few and
long, so that the longest of all key heads have to start first (`turn_of`).

The fast mode (ADDS_DQ) has one program per query head: 5 products per tile instead of 7, but dq is
summed by fp32 atomics, and so are dk and dv where heads share keys (ADDS_DKV), in an order that
changes from run to run.
"""

import triton
import triton.language as tl

from flexmask_kernels.primitives import (
    add_rows,
    head_offset,
    load_rows,
    load_tile,
    sees,
    store_rows,
    tanh,
)


@triton.jit
def _add_gradients(
    dk,  # [BLOCK_K, BLOCK_D] fp32, sum of ds q so far
    dv,  # [BLOCK_K, BLOCK_D_V] fp32, sum of P dout so far
    k,  # [BLOCK_K, BLOCK_D]
    v,  # [BLOCK_K, BLOCK_D_V]
    key,  # int32 [BLOCK_K], index in the row
    end,  # int32 [BLOCK_K]
    q_ptr,
    dout_ptr,
    b,
    head,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    start_ptr,
    tiles_ptr,
    first_tile,
    num_tiles,
    gap_at,  # with ranges, partial tiles: from this step on, `gap` more blocks are passed over
    gap,
    counter_ptr,
    L,
    before_tanh,
    to_log2,
    IS_PARTIAL: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_DO: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ADDS_DQ: tl.constexpr,
    TRANSPOSES_DQ: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Add the queries of `num_tiles` blocks of one head."""
    for step in range(num_tiles):
        if HAS_WINDOW:  # the ranges are in pieces: follow the list, partial tiles from its back
            start = tl.load(tiles_ptr + (-step if IS_PARTIAL else step)) * BLOCK_Q
        elif IS_PARTIAL:
            start = (first_tile + step + tl.where(step >= gap_at, gap, 0)) * BLOCK_Q
        else:
            start = (first_tile + step) * BLOCK_Q
        query = start + tl.arange(0, BLOCK_Q)
        q = load_tile(q_ptr, b, head, start, L, STRIDE_Q, BLOCK_Q, D, BLOCK_D, IS_PARTIAL, USE_TMA)
        if IS_PARTIAL:
            lse2 = tl.load(lse2_ptr + query, mask=query < L, other=0.0)
        else:
            lse2 = tl.load(lse2_ptr + query)
        dout = load_tile(
            dout_ptr, b, head, start, L, STRIDE_DO, BLOCK_Q, D_V, BLOCK_D_V, IS_PARTIAL, USE_TMA
        )
        if IS_PARTIAL:
            delta = tl.load(delta_ptr + query, mask=query < L, other=0.0)
        else:
            delta = tl.load(delta_ptr + query)
        if HAS_SOFTCAP:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_K, BLOCK_Q]
            s = tanh(s * before_tanh)
            p = tl.exp2(s * to_log2 - lse2[None, :])
        else:
            less = tl.broadcast_to((lse2 / -to_log2)[None, :], [BLOCK_K, BLOCK_Q])
            s = tl.dot(k, tl.trans(q), less, input_precision=PRECISION)
            p = tl.exp2(s * to_log2)
        if IS_PARTIAL:
            window_start = query
            if HAS_WINDOW:
                window_start = tl.load(start_ptr + query, mask=query < L, other=0)
            visible = sees(
                query[None, :], key[:, None], end[:, None], window_start[None, :], HAS_WINDOW
            )
            p = tl.where(visible, p, 0.0)
        less = tl.broadcast_to(-delta[None, :], [BLOCK_K, BLOCK_Q])
        dp = tl.dot(v, tl.trans(dout), less, input_precision=PRECISION)
        ds = p * dp
        if HAS_SOFTCAP:
            ds = ds * (1.0 - s * s)
        ds = ds.to(q.dtype)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if ADDS_DQ:
            if TRANSPOSES_DQ:
                dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
            else:
                dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_D]
            add_rows(dq_ptr, dq, start, L, D, BLOCK_Q, D, BLOCK_D, False)
        if COUNT_TILES:
            tl.atomic_add(counter_ptr, 1)
    return dk, dv


@triton.jit
def turn_of(place, num_lines, num_splits, num_heads, num_round):
    """Rank of the line, key head and split of the program that is the `place`-th to start.

    Rounds: the `num_round` longest lines of the first key head, of the second, and so on; then the
    next longest. What runs at one time shares a key head, or two, and no long line starts late.
    """
    first = place // (num_round * num_splits * num_heads) * num_round
    place -= first * num_splits * num_heads
    of_head = tl.minimum(num_round, num_lines - first) * num_splits  # the last round is shorter
    return first + place % of_head // num_splits, place // of_head, place % num_splits


@triton.jit(
    do_not_specialize=[
        *("L", "H", "H_KV", "num_splits", "num_lines", "num_round", "capacity", "num_rows")
    ]
)
def backward_keys_kernel(
    q_ptr,  # [B, H, L, D]; a descriptor with USE_TMA, like dout
    k_ptr,  # [B, H_KV, L, D]
    v_ptr,  # [B, H_KV, L, D_V]
    dout_ptr,  # [B, H, L, D_V]
    lse2_ptr,  # fp32 [B, H, L]
    delta_ptr,  # fp32 [B, H, L]
    dq_ptr,  # fp32 [B, H, whole blocks, D], to add dq / scale to; or None without ADDS_DQ
    dk_ptr,  # [B, H_KV * num_splits, L, D]
    dv_ptr,  # [B, H_KV * num_splits, L, D_V]
    end_ptr,  # int32 [num_rows, L]
    start_ptr,  # int32 [num_rows, L]; None without a window
    plan_ptr,  # as in `planning.Plan`, like the next two; lines are blocks of keys
    tiles_ptr,  # or None without a window
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
    stride_dkb,
    stride_dkh,
    stride_dk,
    stride_dvb,
    stride_dvh,
    stride_dv,
    L,
    H,
    H_KV,
    num_splits,
    num_lines,
    num_round,  # lines of a round, see `turn_of`
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
    ADDS_DQ: tl.constexpr,
    TRANSPOSES_DQ: tl.constexpr,
    ADDS_DKV: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Compute BLOCK_K rows of dk and dv; grid (num_lines * num_splits, H_KV, B)."""
    heads = 1 if ADDS_DQ else H // H_KV // num_splits  # of the group, for this program
    if ADDS_DQ:
        rank, kv_head = tl.program_id(0) // num_splits, tl.program_id(1)
        split = tl.program_id(0) % num_splits
    else:
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        rank, kv_head, split = turn_of(place, num_lines, num_splits, H_KV, num_round)
    b = tl.program_id(2)
    row = tl.minimum(b, num_rows - 1)
    line = tl.load(order_ptr + row * num_lines + rank)
    start = line * BLOCK_K

    k_ptr += head_offset(b, kv_head, stride_kb, stride_kh)
    v_ptr += head_offset(b, kv_head, stride_vb, stride_vh)
    k = load_rows(k_ptr, start, L, STRIDE_K, BLOCK_K, D, BLOCK_D, True)
    v = load_rows(v_ptr, start, L, STRIDE_V, BLOCK_K, D_V, BLOCK_D_V, True)
    key = start + tl.arange(0, BLOCK_K)
    end = tl.load(end_ptr + tl.cast(row, tl.int64) * L + key, mask=key < L, other=0)
    if HAS_WINDOW:
        start_ptr += tl.cast(row, tl.int64) * L
        tiles_ptr += tl.cast(row * num_lines + line, tl.int64) * capacity
    plan_ptr += (row * num_lines + line) * 4
    num_full, num_partial = tl.load(plan_ptr), tl.load(plan_ptr + 1)
    if HAS_WINDOW:
        first, num_front = 0, 0
    else:
        first, num_front = tl.load(plan_ptr + 2), tl.load(plan_ptr + 3)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D_V], tl.float32)
    for member in range(heads):
        head = (kv_head * num_splits + split) * heads + member
        heads_before = tl.cast(b, tl.int64) * H + head
        statistics = heads_before * L
        of_dq = heads_before * tl.cdiv(L, BLOCK_Q) * BLOCK_Q * D
        for IS_PARTIAL in tl.static_range(2):
            dk, dv = _add_gradients(
                dk,
                dv,
                k,
                v,
                key,
                end,
                q_ptr if USE_TMA else q_ptr + head_offset(b, head, stride_qb, stride_qh),
                dout_ptr if USE_TMA else dout_ptr + head_offset(b, head, stride_dob, stride_doh),
                b,
                head,
                lse2_ptr + statistics,
                delta_ptr + statistics,
                dq_ptr + of_dq if ADDS_DQ else None,
                start_ptr,
                tiles_ptr + (capacity - 1) * IS_PARTIAL if HAS_WINDOW else None,
                first if IS_PARTIAL else first + num_front,
                num_partial if IS_PARTIAL else num_full,
                num_front,
                num_full,
                counter_ptr + IS_PARTIAL if COUNT_TILES else None,
                L,
                before_tanh,
                to_log2,
                IS_PARTIAL=IS_PARTIAL,
                STRIDE_Q=STRIDE_Q,
                STRIDE_DO=STRIDE_DO,
                D=D,
                D_V=D_V,
                BLOCK_D=BLOCK_D,
                BLOCK_D_V=BLOCK_D_V,
                BLOCK_Q=BLOCK_Q,
                BLOCK_K=BLOCK_K,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HAS_WINDOW=HAS_WINDOW,
                ADDS_DQ=ADDS_DQ,
                TRANSPOSES_DQ=TRANSPOSES_DQ,
                PRECISION=PRECISION,
                COUNT_TILES=COUNT_TILES,
                USE_TMA=USE_TMA,
            )
    owner = kv_head if ADDS_DQ else kv_head * num_splits + split
    dk_ptr += head_offset(b, owner, stride_dkb, stride_dkh)
    dv_ptr += head_offset(b, owner, stride_dvb, stride_dvh)
    if ADDS_DKV:
        add_rows(dk_ptr, dk * scale, start, L, D, BLOCK_K, D, BLOCK_D, True)
        add_rows(dv_ptr, dv, start, L, D_V, BLOCK_K, D_V, BLOCK_D_V, True)
    else:
        store_rows(dk_ptr, dk * scale, start, stride_dk, L, BLOCK_K, D, BLOCK_D)
        store_rows(dv_ptr, dv, start, stride_dv, L, BLOCK_K, D_V, BLOCK_D_V)
