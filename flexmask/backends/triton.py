"""The project's own Triton kernels, for CUDA; equations and ownership are in docs/kernels.md.

With TRITON_INTERPRET=1 in the environment before triton is first imported, the same kernels run in
Triton's interpreter on CPU tensors: slow, for tests.

Two operators, so that `torch.compile(fullgraph=True)`, CUDA graphs and checkpointing see one node
each way. Gradients are summed by atomic additions in the backward pass, in an order that changes
from run to run, unless `torch.use_deterministic_algorithms(True)` was in force in the forward pass.
"""

from __future__ import annotations

import torch
from flexmask_kernels.backward_pass import backward
from flexmask_kernels.configs import MAX_WIDTH
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Inputs, Options, empty_gradient, empty_output
from torch import Tensor

from flexmask.errors import UnsupportedModelError

_DEVICES = ("cuda", "cpu")  # the latter for the interpreter; `choose_backend` is the guard


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    position_floor: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by Triton kernels, forward and backward, in O(L) memory.

    Args:
        q: queries [B, H, L, D], fp32, bf16 or fp16.
        k: keys [B, H_kv, L, D]; a group's heads read the same memory.
        v: values [B, H_kv, L, D_v].
        subtree_end: int [B, L] or [1, L].
        position_ids: int [B, L] or [1, L]; only looked at with a floor.
        position_floor: like `position_ids`, the lowest position that a query sees; None for all.
        scale: factor of the scores.
        softcap: bound of the scores, or None.
        sinks: [H] or None.

    Returns:
        [B, H, L, D_v] in the dtype of q.

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
    masks = (subtree_end, position_ids, position_floor)
    out, _ = _forward(q, k, v, *masks, sinks, scale, softcap, deterministic)
    return out


@torch.library.custom_op("flexmask::triton_attention", mutates_args=(), device_types=_DEVICES)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    position_floor: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Attention as out [B, H, L, D_v] and base-2 logsumexp, fp32 [B, H, L]."""
    inputs = Inputs(q, k, v, subtree_end, position_ids, position_floor, sinks)
    with torch.cuda.device_of(q):
        return forward(inputs, Options(scale, softcap))


@torch.library.custom_op(
    "flexmask::triton_attention_backward", mutates_args=(), device_types=_DEVICES
)
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    position_floor: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse2: Tensor,
    scale: float,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and sinks; the last is fp32, and empty without sinks."""
    inputs = Inputs(q, k, v, subtree_end, position_ids, position_floor, sinks)
    options = Options(scale, softcap)
    with torch.cuda.device_of(q):
        dq, dk, dv, dsinks = backward(dout, inputs, out, lse2, options, deterministic=deterministic)
    return dq, dk, dv, lse2.new_empty(0) if dsinks is None else dsinks


@_forward.register_fake
def _(q, k, v, subtree_end, positions, floor, sinks, scale, softcap, deterministic):
    return empty_output(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(dout, q, k, v, end, positions, floor, sinks, out, lse2, scale, softcap, deterministic):
    dsinks = lse2.new_empty(0 if sinks is None else q.shape[1])
    return *(empty_gradient(x) for x in (q, k, v)), dsinks


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout: Tensor, _: Tensor | None):
    saved = ctx.saved_tensors  # once: under checkpointing they can be unpacked no second time
    sinks = saved[6]
    options = (ctx.scale, ctx.softcap, ctx.deterministic)
    dq, dk, dv, dsinks = _backward(dout, *saved, *options)
    dsinks = None if sinks is None else dsinks.to(sinks.dtype)
    return dq, dk, dv, None, None, None, dsinks, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
