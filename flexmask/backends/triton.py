"""The project's own Triton kernels, for CUDA; equations and ownership are in docs/kernels.md.

With TRITON_INTERPRET=1 in the environment before triton is first imported, the same kernels run in
Triton's interpreter on CPU tensors: slow, for tests.

Operators, so that `torch.compile(fullgraph=True)`, CUDA graphs and checkpointing see one node each
way. What a kernel visits is planned outside of them, once for all layers that see equally far.
Gradients are summed by atomic additions in the backward pass, in an order that changes from run to
run, unless `torch.use_deterministic_algorithms(True)` was in force in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from flexmask_kernels.arguments import config_of
from flexmask_kernels.backward_pass import backward, kernels_of
from flexmask_kernels.configs import BY_KEY, MAX_WIDTH
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Inputs, Options, empty_gradient, empty_output
from flexmask_kernels.planning import Plan, empty_plan, plan_lines
from flexmask_kernels.tuning import choose_config
from torch import Tensor

from flexmask.backends.cache import per_mask_cache
from flexmask.errors import UnsupportedModelError

_DEVICES = ("cuda", "cpu")  # the latter for the interpreter; `choose_backend` is the guard


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference_attention` by Triton kernels, forward and backward, in O(L) memory.

    A group's heads read the same keys and values in memory.

    Raises:
        UnsupportedModelError: fp64, or heads wider than 256.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"backend 'triton' takes fp32, bf16 and fp16, got {q.dtype}; use backend='reference'"
        )
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_WIDTH:
        raise UnsupportedModelError(
            f"backend 'triton' takes heads at most {MAX_WIDTH} wide, got {widest}; "
            "use backend='flex' or 'reference'"
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    plan = _plan("forward", q, v, subtree_end, window_start, softcap)
    masks = (subtree_end, window_start)
    out, _ = _forward(q, k, v, *masks, sinks, plan, scale, softcap, deterministic)
    return out


def _plan(
    kernel: str,
    q: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    softcap: float | None,
) -> list[Tensor]:
    """The `Plan` of a kernel; eager callers get it once for all layers."""
    masks = (subtree_end,) if window_start is None else (subtree_end, window_start)
    if torch.compiler.is_compiling():
        is_plain = softcap is None and window_start is None
        widths = (q.shape[-1], v.shape[-1])
        return list(_plan_in_graph(subtree_end, window_start, kernel, *widths, q.dtype, is_plain))
    config = config_of(kernel, Inputs(q, q, v, *masks), Options(1.0, softcap))
    return list(per_mask_cache(plan_lines, *masks, config=config, by_key=kernel in BY_KEY))


@torch.library.custom_op("flexmask::triton_plan", mutates_args=(), device_types=_DEVICES)
def _plan_in_graph(
    subtree_end: Tensor,
    window_start: Tensor | None,
    kernel: str,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    is_plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plan by what it depends on, so that a compiler sees that layers have the same."""
    options = _plan_options(subtree_end, kernel, width, value_width, dtype, is_plain)
    return plan_lines(subtree_end, window_start, **options)


@_plan_in_graph.register_fake
def _(subtree_end, window_start, *what):
    return empty_plan(subtree_end, window_start, **_plan_options(subtree_end, *what))


def _plan_options(
    subtree_end: Tensor,
    kernel: str,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    is_plain: bool,
) -> dict[str, Any]:
    """What `plan_lines` takes beside the mask."""
    q, v = (subtree_end.new_empty(0, size, dtype=dtype) for size in (width, value_width))
    config = choose_config(kernel, q, v, is_plain=is_plain)
    return {"config": config, "by_key": kernel in BY_KEY}


@torch.library.custom_op("flexmask::triton_attention", mutates_args=(), device_types=_DEVICES)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    plan: list[Tensor],
    scale: float,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Attention as out [B, H, L, D_v] and base-2 logsumexp, fp32 [B, H, L]."""
    inputs = Inputs(q, k, v, subtree_end, window_start, sinks)
    with torch.cuda.device_of(q):
        return forward(inputs, Options(scale, softcap), Plan(*plan))


@torch.library.custom_op(
    "flexmask::triton_attention_backward", mutates_args=(), device_types=_DEVICES
)
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse2: Tensor,
    plans: list[Tensor],
    scale: float,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and sinks; the last is fp32, and empty without sinks.

    `plans` are those of `kernels_of(deterministic)`, one after the other.
    """
    inputs = Inputs(q, k, v, subtree_end, window_start, sinks)
    by_kernel = {
        kernel: Plan(*plans[3 * number : 3 * number + 3])
        for number, kernel in enumerate(kernels_of(deterministic))
    }
    with torch.cuda.device_of(q):
        dq, dk, dv, dsinks = backward(
            dout,
            inputs,
            out,
            lse2,
            Options(scale, softcap),
            deterministic=deterministic,
            plans=by_kernel,
        )
    return dq, dk, dv, lse2.new_empty(0) if dsinks is None else dsinks


@_forward.register_fake
def _(q, k, v, end, start, sinks, plan, scale, softcap, deterministic):
    return empty_output(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(dout, q, k, v, end, start, sinks, out, lse2, plans, scale, softcap, deterministic):
    dsinks = lse2.new_empty(0 if sinks is None else q.shape[1])
    return *(empty_gradient(x) for x in (q, k, v)), dsinks


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.scale, ctx.softcap, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout: Tensor, _: Tensor | None):
    saved = ctx.saved_tensors  # once: under checkpointing they can be unpacked no second time
    q, _, v, end, start, sinks, *_ = saved
    plans = [
        part
        for kernel in kernels_of(ctx.deterministic)
        for part in _plan(kernel, q, v, end, start, ctx.softcap)
    ]
    options = (ctx.scale, ctx.softcap, ctx.deterministic)
    dq, dk, dv, dsinks = _backward(dout, *saved, plans, *options)
    dsinks = None if sinks is None else dsinks.to(sinks.dtype)
    return dq, dk, dv, None, None, dsinks, [None] * 3, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
