"""FlashAttention's two operators in plain PyTorch, with a dense row of scores for each sequence.

They stand in for the kernels on CPU tensors, so that what surrounds these can be tested; they take
the arguments of `aten._flash_attention_forward` and `_backward` that the `varlen` backend passes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexmask.backends.reference import precise_dtype


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor]:
    """Out [total_q, H, D] and logsumexp [H, total_q], the latter in fp32 or fp64."""
    parts = []
    for rows, keys in _sequences(cu_q, cu_k):
        scores = _scores(q[rows], k[keys], scale, window_size_left)
        values = _per_head(v[keys], q.shape[1], scores.dtype)
        parts.append((torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)))
    out, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return out.transpose(0, 1).to(q.dtype).contiguous(), lse


def plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the shapes and dtypes of q, k and v."""
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for rows, keys in _sequences(cu_q, cu_k):
        scores = _scores(q[rows], k[keys], scale, window_size_left)
        weights = torch.exp(scores - lse[:, rows].unsqueeze(-1))  # [H, queries, keys]
        heads, dtype = q.shape[1], scores.dtype
        q_rows, dout_rows, out_rows = (_per_head(x[rows], heads, dtype) for x in (q, dout, out))
        k_rows, v_rows = (_per_head(x[keys], heads, dtype) for x in (k, v))
        delta = (dout_rows * out_rows).sum(-1, keepdim=True)
        dscores = scale * weights * (dout_rows @ v_rows.mT - delta)
        parts = (dscores @ k_rows, dscores.mT @ q_rows, weights.mT @ dout_rows)
        for grad, part, place in zip(grads, parts, (rows, keys, keys), strict=True):
            summed = part.unflatten(0, (grad.shape[1], -1)).sum(1)  # over the heads of a group
            grad[place] = summed.transpose(0, 1).to(grad.dtype)
    return grads[0], grads[1], grads[2]


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    edges = torch.stack((cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]), 1)
    for q_start, q_stop, k_start, k_stop in edges.tolist():
        yield slice(q_start, q_stop), slice(k_start, k_stop)


def _scores(q: Tensor, k: Tensor, scale: float, window_left: int) -> Tensor:
    """[H, queries, keys]; -inf where a mask aligned to the bottom right hides a key."""
    dtype = precise_dtype(q)
    heads = q.shape[1]
    scores = scale * (_per_head(q, heads, dtype) @ _per_head(k, heads, dtype).mT)
    place = torch.arange(q.shape[0]).unsqueeze(-1) + k.shape[0] - q.shape[0]
    before = place - torch.arange(k.shape[0])
    hidden = (before < 0) if window_left < 0 else (before < 0) | (before > window_left)
    return scores.masked_fill(hidden.to(q.device), float("-inf"))


def _per_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The rows [rows, heads or fewer, D] as [heads, rows, D]."""
    return x.transpose(0, 1).to(dtype).repeat_interleave(heads // x.shape[1], 0)
