"""The forward pass: check, allocate, launch.

A pass queues its launches and runs them at the end, so that a first call compiles side by side.
Nothing in it waits for the device or depends on its values, so a CUDA graph can hold it all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask_kernels.arguments import (
    common_arguments,
    config_of,
    head_grid,
    plan_kernel,
    strides,
)
from flexmask_kernels.descriptors import walked_tensors
from flexmask_kernels.forward import forward_kernel
from flexmask_kernels.inputs import Counters, Inputs, Options, empty_output, prepare
from flexmask_kernels.launches import LaunchQueue
from flexmask_kernels.planning import Plan


def forward(
    inputs: Inputs,
    options: Options,
    plan: Plan | None = None,
    counters: Counters | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, L, D_v] and lse2, the base-2 logsumexp of the scores, fp32 [B, H, L].

    Args:
        inputs: the tensors.
        options: what changes the scores.
        plan: that of `plan_kernel` for "forward"; None to make it here.
        counters: where to count tiles.

    Raises:
        ValueError: heads wider than MAX_WIDTH, or a dtype that the kernels do not have.
    """
    inputs = prepare(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    B, H, L, _ = q.shape
    config = config_of("forward", inputs, options)
    plan = plan or plan_kernel("forward", inputs, options)
    queue = LaunchQueue()
    counter = None if counters is None else counters.forward
    out = empty_output(q, v)
    lse2 = torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    queue.add(
        forward_kernel,
        (plan.lines.shape[1] * (H // k.shape[1]), *head_grid(k)),
        q_ptr=q,
        out_ptr=out,
        lse2_ptr=lse2,
        sink_ptr=inputs.sinks,
        HAS_SINKS=inputs.sinks is not None,
        **strides(constant=False, o=out),
        **walked_tensors(config, config.block_k, k_ptr=k, v_ptr=v),
        **common_arguments(inputs, options, config, plan, counter),
    )
    queue.run()
    return out, lse2
