"""The backward pass: check, allocate, launch; like `forward_pass`, without a wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from flexmask_kernels.arguments import (
    LOG2E,
    common_arguments,
    config_of,
    head_grid,
    plan_kernel,
    strides,
)
from flexmask_kernels.backward_keys import backward_keys_kernel
from flexmask_kernels.backward_queries import backward_queries_kernel, delta_kernel
from flexmask_kernels.configs import (
    NUM_ROUND,
    block_width,
    capability_of,
    num_head_splits,
    num_processors,
    transposes_dq,
)
from flexmask_kernels.descriptors import walked_tensors
from flexmask_kernels.inputs import (
    Counters,
    Inputs,
    Options,
    empty_gradient,
    prepare,
    unit_stride,
)
from flexmask_kernels.launches import LaunchQueue
from flexmask_kernels.planning import Plan

_DELTA_BLOCK = 32  # queries


def kernels_of(deterministic: bool) -> tuple[str, ...]:
    """The attention kernels of the pass, by name."""
    return ("backward_queries", "backward_keys") if deterministic else ("backward_fused",)


def backward(
    dout: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse2: Tensor,
    options: Options,
    *,
    deterministic: bool,
    plans: Mapping[str, Plan] | None = None,
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
        plans: those of `plan_kernel`, by `kernels_of`; None to make them here.
        counters: where to count tiles.
    """
    inputs = prepare(inputs)
    if plans is None:
        plans = {
            kernel: plan_kernel(kernel, inputs, options) for kernel in kernels_of(deterministic)
        }
    B, H, L, _ = out.shape
    dout = unit_stride(dout)
    delta = torch.empty(B, H, L, dtype=torch.float32, device=out.device)
    queue = LaunchQueue()
    queue.add(
        delta_kernel,
        (triton.cdiv(L, _DELTA_BLOCK), H, B),
        out_ptr=out,
        dout_ptr=dout,
        delta_ptr=delta,
        **strides(o=out, do=dout),
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
        _queue_queries(queue, plans, dq, inputs, saved, options, counters)
    else:
        # whole blocks, so that no program asks where the row ends
        block_q = config_of("backward_fused", inputs, options).block_q
        shape = (B, H, triton.cdiv(L, block_q) * block_q, dq.shape[3])
        dq_sum = torch.zeros(shape, dtype=torch.float32, device=dq.device)
    shares = _queue_keys(queue, plans, (dk, dv), dq_sum, inputs, saved, options, counters)
    queue.run()
    if dq_sum is not None:
        torch.mul(dq_sum[:, :, :L], options.scale, out=dq)
    for grad, share in zip((dk, dv), shares, strict=True):
        _add_shares(grad, share)
    dsinks = None
    if inputs.sinks is not None:
        weight = torch.exp2(inputs.sinks.view(1, H, 1) * LOG2E - lse2)
        dsinks = -(weight * delta).sum((0, 2))
    return dq, dk, dv, dsinks


def _queue_queries(
    queue: LaunchQueue,
    plans: Mapping[str, Plan],
    dq: Tensor,
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor],
    options: Options,
    counters: Counters | None,
) -> None:
    """Queue what computes dq; `saved` holds dout, lse2 and delta."""
    dout, lse2, delta = saved
    q, k = inputs.q, inputs.k
    config, plan = config_of("backward_queries", inputs, options), plans["backward_queries"]
    counter = None if counters is None else counters.backward_queries
    queue.add(
        backward_queries_kernel,
        (plan.lines.shape[1] * (q.shape[1] // k.shape[1]), *head_grid(k)),
        q_ptr=q,
        dout_ptr=dout,
        lse2_ptr=lse2,
        delta_ptr=delta,
        dq_ptr=dq,
        scale=options.scale,
        **strides(do=dout),
        **strides(constant=False, dq=dq),
        **walked_tensors(config, config.block_k, k_ptr=k, v_ptr=inputs.v),
        **common_arguments(inputs, options, config, plan, counter),
    )


def _queue_keys(
    queue: LaunchQueue,
    plans: Mapping[str, Plan],
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
    config, plan = config_of(kernel, inputs, options), plans[kernel]
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
        (num_lines * num_splits, *head_grid(k)),
        k_ptr=k,
        v_ptr=v,
        lse2_ptr=lse2,
        delta_ptr=delta,
        dq_ptr=dq_sum,
        dk_ptr=dk,
        dv_ptr=dv,
        num_splits=num_splits,
        num_round=NUM_ROUND,
        scale=options.scale,
        ADDS_DQ=dq_sum is not None,
        TRANSPOSES_DQ=transposes_dq(capability_of(q.device), D),
        ADDS_DKV=adds,
        **strides(do=dout),
        **strides(constant=False, dk=dk, dv=dv),
        **walked_tensors(config, config.block_q, q_ptr=q, dout_ptr=dout),
        **common_arguments(
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
