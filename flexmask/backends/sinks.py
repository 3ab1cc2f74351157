"""Attention sinks after the softmax: one more logit, of value 0, in its denominator.

With s the sink and lse the logsumexp without it:

    out' = sigmoid(lse - s) out,    lse' = log(exp(lse) + exp(s)),
    ds   = -sum_q exp(s - lse') dout_q . out'_q.

A kernel's own backward pass, given out' and lse', computes the other gradients: it takes P as
exp(score - lse').
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Turn out [..., D] and lse [...] into those with sinks, which broadcast to lse, in place."""
    out.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1))
    torch.logaddexp(lse, sinks, out=lse)


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient [H] of sinks [H], of dout and out [B, H, L, D], and lse [B, H, L]."""
    weight = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
    return -(weight * (dout.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
