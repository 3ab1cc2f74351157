"""Training on CPUs: exact tree attention from ordinary flash kernels, with nothing of size L x L.

The visible pairs of a row are covered by flash calls (see `calls`, and `cpu_capped` for a softcap),
each normalised over its own keys only. Two partial results of a query are merged as in ring
attention (Liu et al., arXiv 2310.01889). With lse = log sum_k exp(s_k) of each part:

    w   = sigmoid(lse_2 - lse_1)
    out = (1 - w) out_1 + w out_2
    lse = log(exp(lse_1) + exp(lse_2))

A sink is one more part, of value 0 and lse = sink. The backward pass hands the merged out and lse
to the kernel's own backward, call by call: with P = exp(s - lse) its gradients are exactly each
call's share of the whole,

    dv_k = sum_q P dout_q,    ds = P (dout_q . v_k - dout_q . out_q),

and dsink = -sum_q exp(sink - lse) dout_q . out_q.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexmask.backends.cache import per_mask_cache
from flexmask.backends.calls import plan_rows
from flexmask.backends.cpu_row import Row, row_backward, row_forward
from flexmask.backends.reference import precise_dtype
from flexmask.backends.sinks import sink_gradient
from flexmask.tree.intervals import mask_mod

Gradients = tuple[Tensor, Tensor, Tensor]


def cpu_attention(
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
    """`reference_attention` on CPU tensors in O(L) memory, with a backward pass.

    A group's heads read the same keys and values in memory. Where D_v is not D, the narrower are
    padded with zeros. With a softcap it is about half as fast.
    """
    D, D_v = q.shape[-1], v.shape[-1]
    if D_v < D:
        v = pad(v, (0, D - D_v))
    elif D_v > D:
        q, k = pad(q, (0, D_v - D)), pad(k, (0, D_v - D))
    out, _ = _forward(q, k, v, subtree_end, window_start, sinks, scale, softcap)
    return out[..., :D_v]


@torch.library.custom_op("flexmask::cpu_attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention as out [B, H, L, D] and logsumexp [B, H, L], the latter in fp32 or fp64."""
    out, lse = _empty_results(q)
    for b in range(q.shape[0]):
        row = _row(b, q, k, v, subtree_end, window_start, sinks, scale, softcap)
        precise = _precise_like(out[b])
        row_forward(row, _grouped(precise, row), _grouped(lse[b], row))
        if precise.dtype != out.dtype:
            out[b] = precise
    return out, lse


@torch.library.custom_op("flexmask::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    grads = _empty_gradients(q, k, v)
    dout = _unit_stride(dout)
    for b in range(q.shape[0]):
        row = _row(b, q, k, v, subtree_end, window_start, sinks, scale, softcap)
        dq, dk, dv = precise = [_precise_like(x[b]) for x in grads]
        dout_b, out_b, lse_b, dq = (_grouped(x, row) for x in (dout[b], out[b], lse[b], dq))
        row_backward(row, dout_b, out_b, lse_b, dq, dk.zero_(), dv.zero_())
        for x, y in zip(grads, precise, strict=True):
            if y.dtype != x.dtype:
                x[b] = y
    return grads


@_forward.register_fake
def _(q, k, v, subtree_end, window_start, sinks, scale, softcap):
    return _empty_results(q)


@_backward.register_fake
def _(dout, q, k, v, end, start, sinks, out, lse, scale, softcap):
    return _empty_gradients(q, k, v)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout: Tensor, _: Tensor | None):
    saved = ctx.saved_tensors  # once: under checkpointing they can be unpacked no second time
    *_, sinks, out, lse = saved
    dq, dk, dv = _backward(dout, *saved, ctx.scale, ctx.softcap)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[5]:
        dsinks = sink_gradient(dout, out, lse, sinks)
    return dq, dk, dv, None, None, dsinks, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _row(
    b: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Row:
    """Row b, with the heads of q and the sinks as [H_kv, G]."""
    q, k, v = (_unit_stride(x[b]) for x in (q, k, v))
    heads = (k.shape[0], -1)
    masks = (subtree_end,) if window_start is None else (subtree_end, window_start)
    plans = per_mask_cache(plan_rows, *masks)
    number = b if len(plans) > 1 else 0
    visible = partial(mask_mod(*masks), torch.tensor(number), torch.tensor(0))
    if sinks is not None:
        sinks = sinks.to(precise_dtype(q)).unflatten(0, heads).unsqueeze(-1)
    return Row(q.unflatten(0, heads), k, v, plans[number], visible, sinks, scale, softcap)


def _grouped(x: Tensor, row: Row) -> Tensor:
    """View x [H, ...] as [H_kv, G, ...]."""
    return x.unflatten(0, row.q.shape[:2])


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read the last dimension as if its stride were 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Out as a view of [B, L, H, D], the layout that models go on with, and logsumexp."""
    B, H, L, D = q.shape
    return q.new_empty(B, L, H, D).transpose(1, 2), q.new_empty(B, H, L, dtype=precise_dtype(q))


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Gradients [B, H, L, D], contiguous as the kernel's own are."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _precise_like(x: Tensor) -> Tensor:
    """Where to compute x: in x itself if it is fp32 or fp64, else in a new fp32 tensor."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return torch.empty_like(x, dtype=torch.float32)
