"""Forward and backward passes: check, allocate, launch. Which tile sizes is `configs`' decision.

A pass queues its launches and runs them at the end, so that a first call compiles side by side.
Nothing here waits for the device or depends on its values, so a CUDA graph can hold it all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexmask_kernels.backward_keys import backward_keys_kernel
from flexmask_kernels.backward_queries import backward_queries_kernel, delta_kernel
from flexmask_kernels.configs import (
    MAX_WIDTH,
    NUM_ROUND,
    Config,
    block_width,
    num_head_splits,
    num_processors,
)
from flexmask_kernels.descriptors import walked_tensors
from flexmask_kernels.forward import forward_kernel
from flexmask_kernels.launches import LaunchQueue
from flexmask_kernels.planning import Plan, plan_lines
from flexmask_kernels.tuning import choose_config

_DELTA_BLOCK = 32  # queries
_LOG2E = math.log2(math.e)


class Options(NamedTuple):
    """What changes the scores, apart from the tensors.

    Attributes:
        scale: factor of the scores, above 0.
        softcap: bound of the scores, or None.
    """

    scale: float
    softcap: float | None = None


class Inputs(NamedTuple):
    """The tensors of both passes.

    Attributes:
        q: [B, H, L, D], fp32, bf16 or fp16; any strides, like the next two.
        k: [B, H_kv, L, D].
        v: [B, H_kv, L, D_v].
        end: int32 [B, L] or [1, L], subtree ends.
        positions: int32, like `end`; None without a floor.
        floor: int32, like `end`, the lowest position that a query sees; None for all.
        sinks: fp32 [H], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    end: Tensor
    positions: Tensor | None = None
    floor: Tensor | None = None
    sinks: Tensor | None = None


class Counters(NamedTuple):
    """Tiles visited, int32 [2] each: full ones, partial ones. For tests; counting takes time."""

    forward: Tensor
    backward_queries: Tensor
    backward_keys: Tensor


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, L, D_v] as a view of [B, L, H, D_v], the layout that models go on with."""
    return empty_gradient(q, v.shape[3])


def empty_gradient(x: Tensor, width: int | None = None) -> Tensor:
    """[B, heads, L, width or x's own] as a view of [B, L, heads, width]."""
    B, heads, L, D = x.shape
    shape = (B, L, heads, width or D)
    return torch.empty(shape, dtype=x.dtype, device=x.device).transpose(1, 2)


def forward(
    inputs: Inputs, options: Options, counters: Counters | None = None
) -> tuple[Tensor, Tensor]:
    """The output [B, H, L, D_v] and lse2, the base-2 logsumexp of the scores, fp32 [B, H, L].

    Raises:
        ValueError: heads wider than MAX_WIDTH, or a dtype that the kernels do not have.
    """
    inputs = _prepare(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    B, H, L, _ = q.shape
    queue = LaunchQueue()
    config, plan = _plan(queue, "forward", inputs, options)
    out = empty_output(q, v)
    lse2 = torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    queue.add(
        forward_kernel,
        (plan.lines.shape[1] * (H // k.shape[1]), *_grid(k)),
        q_ptr=q,
        out_ptr=out,
        lse2_ptr=lse2,
        sink_ptr=inputs.sinks,
        stride_ob=out.stride(0),
        stride_oh=out.stride(1),
        stride_o=out.stride(2),
        HAS_SINKS=inputs.sinks is not None,
        **walked_tensors(config, config.block_k, k_ptr=k, v_ptr=v),
        **_common(inputs, options, config, plan, None if counters is None else counters.forward),
    )
    queue.run()
    return out, lse2


def backward(
    dout: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse2: Tensor,
    options: Options,
    *,
    deterministic: bool,
    counters: Counters | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and sinks, the last in fp32.

    Args:
        dout: gradient of the output [B, H, L, D_v].
        inputs: those of the forward pass.
        out: its output.
        lse2: its logsumexp.
        options: those of the forward pass.
        deterministic: dq in a kernel of its own, the same bits on every run; else by atomic sums.
        counters: where to count tiles.
    """
    inputs = _prepare(inputs)
    B, H, L, _ = out.shape
    dout = _unit_stride(dout)
    delta = torch.empty(B, H, L, dtype=torch.float32, device=out.device)
    queue = LaunchQueue()
    queue.add(
        delta_kernel,
        (triton.cdiv(L, _DELTA_BLOCK), H, B),
        out_ptr=out,
        dout_ptr=dout,
        delta_ptr=delta,
        stride_ob=out.stride(0),
        stride_oh=out.stride(1),
        STRIDE_O=out.stride(2),
        stride_dob=dout.stride(0),
        stride_doh=dout.stride(1),
        STRIDE_DO=dout.stride(2),
        L=L,
        H=H,
        D_V=out.shape[3],
        BLOCK_D_V=block_width(out.shape[3]),
        BLOCK_Q=_DELTA_BLOCK,
    )
    saved = (dout, lse2, delta)
    dq, dk, dv = (empty_gradient(x) for x in (inputs.q, inputs.k, inputs.v))
    dq_sum = None
    if deterministic:
        _queue_queries(queue, dq, inputs, saved, options, counters)
    else:
        dq_sum = torch.zeros(inputs.q.shape, dtype=torch.float32, device=dq.device)
    shares = _queue_keys(queue, (dk, dv), dq_sum, inputs, saved, options, counters)
    queue.run()
    if dq_sum is not None:
        torch.mul(dq_sum, options.scale, out=dq)
    for grad, share in zip((dk, dv), shares, strict=True):
        _add_shares(grad, share)
    dsinks = None
    if inputs.sinks is not None:
        weight = torch.exp2(inputs.sinks.view(1, H, 1) * _LOG2E - lse2)
        dsinks = -(weight * delta).sum((0, 2))
    return dq, dk, dv, dsinks


def _queue_queries(
    queue: LaunchQueue,
    dq: Tensor,
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor],
    options: Options,
    counters: Counters | None,
) -> None:
    """Queue what computes dq; `saved` holds dout, lse2 and delta."""
    dout, lse2, delta = saved
    q, k = inputs.q, inputs.k
    config, plan = _plan(queue, "backward_queries", inputs, options)
    counter = None if counters is None else counters.backward_queries
    queue.add(
        backward_queries_kernel,
        (plan.lines.shape[1] * (q.shape[1] // k.shape[1]), *_grid(k)),
        q_ptr=q,
        dout_ptr=dout,
        lse2_ptr=lse2,
        delta_ptr=delta,
        dq_ptr=dq,
        stride_dob=dout.stride(0),
        stride_doh=dout.stride(1),
        STRIDE_DO=dout.stride(2),
        stride_dqb=dq.stride(0),
        stride_dqh=dq.stride(1),
        stride_dq=dq.stride(2),
        scale=options.scale,
        **walked_tensors(config, config.block_k, k_ptr=k, v_ptr=inputs.v),
        **_common(inputs, options, config, plan, counter),
    )


def _queue_keys(
    queue: LaunchQueue,
    grads: tuple[Tensor, Tensor],
    dq_sum: Tensor | None,
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor],
    options: Options,
    counters: Counters | None,
) -> tuple[Tensor, Tensor]:
    """Queue what computes dk and dv, and adds dq to `dq_sum` if there is one.

    Returns:
        What is written: `grads` or, where programs share a key head, fp32 sums of dk and dv:
        [B, H_kv, L, D] of all programs in the fast mode, else [B, H_kv * num_splits, L, D].
    """
    dout, lse2, delta = saved
    q, k, v = inputs.q, inputs.k, inputs.v
    B, H_kv, L, D = k.shape
    kernel = "backward_keys" if dq_sum is None else "backward_fused"
    config, plan = _plan(queue, kernel, inputs, options)
    num_lines = plan.lines.shape[1]
    group = q.shape[1] // H_kv
    if dq_sum is not None:
        num_splits = group
    else:
        num_splits = num_head_splits(group, num_lines * H_kv * B, num_processors(q.device))
    shares, adds = grads, dq_sum is not None and num_splits > 1
    if num_splits > 1:
        allocate = torch.zeros if adds else torch.empty
        heads = (B, H_kv if adds else H_kv * num_splits, L)
        shares = (
            allocate(*heads, D, dtype=torch.float32, device=k.device),
            allocate(*heads, v.shape[3], dtype=torch.float32, device=k.device),
        )
    dk, dv = shares
    queue.add(
        backward_keys_kernel,
        (num_lines * num_splits, *_grid(k)),
        k_ptr=k,
        v_ptr=v,
        lse2_ptr=lse2,
        delta_ptr=delta,
        dq_ptr=dq_sum,
        dk_ptr=dk,
        dv_ptr=dv,
        stride_dob=dout.stride(0),
        stride_doh=dout.stride(1),
        STRIDE_DO=dout.stride(2),
        stride_dkb=dk.stride(0),
        stride_dkh=dk.stride(1),
        stride_dk=dk.stride(2),
        stride_dvb=dv.stride(0),
        stride_dvh=dv.stride(1),
        stride_dv=dv.stride(2),
        num_splits=num_splits,
        num_round=NUM_ROUND,
        scale=options.scale,
        ADDS_DQ=dq_sum is not None,
        ADDS_DKV=adds,
        **walked_tensors(config, config.block_q, q_ptr=q, dout_ptr=dout),
        **_common(
            inputs, options, config, plan, None if counters is None else counters.backward_keys
        ),
    )
    return shares


def _add_shares(grad: Tensor, share: Tensor) -> None:
    """Write the sum of all shares of a key head's gradient to `grad`, in a fixed order."""
    if share is grad:
        return
    heads = grad.shape[1]
    is_sum = share.shape[1] == heads
    grad.copy_(share if is_sum else share.unflatten(1, (heads, -1)).sum(2))


def _plan(queue: LaunchQueue, kernel: str, inputs: Inputs, options: Options) -> tuple[Config, Plan]:
    """The tile sizes of `kernel`, and what its programs visit once `queue` has run."""
    is_plain = options.softcap is None and inputs.floor is None
    config = choose_config(kernel, inputs.q, inputs.v, is_plain=is_plain)
    is_by_key = kernel in ("backward_keys", "backward_fused")
    masks = (inputs.end, inputs.positions, inputs.floor)
    return config, plan_lines(queue, *masks, config, by_key=is_by_key)


def _common(
    inputs: Inputs, options: Options, config: Config, plan: Plan, counter: Tensor | None
) -> dict[str, Any]:
    """The arguments that all three attention kernels take, apart from tensors of tokens."""
    q, k, v = inputs.q, inputs.k, inputs.v
    width, value_width = q.shape[3], v.shape[3]
    softcap = options.softcap
    is_tf32 = q.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return {
        "end_ptr": inputs.end,
        "position_ptr": inputs.positions,
        "floor_ptr": inputs.floor,
        "plan_ptr": plan.lines,
        "tiles_ptr": plan.tiles,
        "order_ptr": plan.order,
        "counter_ptr": counter,
        "stride_qb": q.stride(0),
        "stride_qh": q.stride(1),
        "STRIDE_Q": q.stride(2),
        "stride_kb": k.stride(0),
        "stride_kh": k.stride(1),
        "STRIDE_K": k.stride(2),
        "stride_vb": v.stride(0),
        "stride_vh": v.stride(1),
        "STRIDE_V": v.stride(2),
        "L": q.shape[2],
        "H": q.shape[1],
        "H_KV": k.shape[1],
        "num_lines": plan.lines.shape[1],
        "capacity": plan.capacity,
        "num_rows": inputs.end.shape[0],
        "before_tanh": options.scale / (softcap or 1.0),
        "to_log2": (softcap or options.scale) * _LOG2E,
        "D": width,
        "D_V": value_width,
        "BLOCK_D": block_width(width),
        "BLOCK_D_V": block_width(value_width),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_FLOOR": inputs.floor is not None,
        "PRECISION": "tf32" if is_tf32 else "ieee",
        "COUNT_TILES": counter is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # scores * to_log2 - lse2 is one instruction
    }


def _prepare(inputs: Inputs) -> Inputs:
    """The inputs as the kernels read them; copies only what has no unit stride in a row."""
    q, k, v, end, positions, floor, sinks = inputs
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be fp32, bf16 or fp16, got {q.dtype}")
    widest = max(q.shape[3], v.shape[3])
    if widest > MAX_WIDTH:
        raise ValueError(f"heads must be at most {MAX_WIDTH} wide, got {widest}")
    masks = [end]
    if positions is not None and floor is not None:
        masks = list(torch.broadcast_tensors(end, positions, floor))
    return Inputs(
        *(_unit_stride(x) for x in (q, k, v)),
        *(x.to(torch.int32).contiguous() for x in masks),
        sinks=None if sinks is None else sinks.to(torch.float32).contiguous(),
    )


def _grid(k: Tensor) -> tuple[int, int]:
    """The second and third axis of every attention kernel's grid: key heads, rows."""
    return k.shape[1], k.shape[0]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
