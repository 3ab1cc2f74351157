"""One call of the `cpu` backend with a softcap, which no flash kernel for CPUs has.

With s = scale * q . k and t = softcap * tanh(s / softcap), a call gives

    out = softmax(t) v,    lse = log sum exp(t)

over its own keys, and, with P = exp(t - lse) for the merged lse and D = dout . out,

    dv = P^T dout,    ds = P (dout v^T - D) (1 - (t / softcap)^2),
    dq = scale ds k,    dk = scale ds^T q,

as without a softcap but for the last factor of ds. Scores are held for one call at a time, so calls
come cut into blocks. Everything is computed in fp32, or fp64 if the inputs are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexmask.backends.reference import precise_dtype


class Block(NamedTuple):
    """The operands of a call: q [H_kv, G, R, D], k and v [H_kv, K, D], `seen` bool [R, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None
    scale: float
    softcap: float


def capped_forward(block: Block) -> tuple[Tensor, Tensor]:
    """Out [H_kv, G, R, D] and lse [H_kv, G, R]; 0 and -inf for a query that sees no key here."""
    scores = _scores(block)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = _grouped(_flat(weights) @ block.v.to(scores.dtype), block)
    return out / total.clamp(min=torch.finfo(total.dtype).tiny), (largest + total.log()).squeeze(-1)


def capped_backward(
    block: Block, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of dq [H_kv, G, R, D], and of dk and dv, each [H_kv, 1, K, D].

    Args:
        block: the operands of the forward pass.
        dout: gradients of the merged output [H_kv, G, R, D].
        out: the merged output.
        lse: the merged logsumexp [H_kv, G, R].
    """
    scores = _scores(block)
    q, k, v, dout, out = (x.to(scores.dtype) for x in (block.q, block.k, block.v, dout, out))
    weights = torch.exp(scores - lse.unsqueeze(-1))  # [H_kv, G, R, K], 0 where a key is not seen
    dv = _flat(weights).transpose(1, 2) @ _flat(dout)
    dscores = _grouped(_flat(dout) @ v.transpose(1, 2), block)
    dscores -= (dout * out).sum(-1, keepdim=True)
    dscores *= weights
    slope = 1 - (scores / block.softcap).square()
    dscores *= slope if block.seen is None else slope.masked_fill_(~block.seen, 0.0)
    dscores *= block.scale
    dq = _grouped(_flat(dscores) @ k, block)
    dk = _flat(dscores).transpose(1, 2) @ _flat(q)
    return dq, dk.unsqueeze(1), dv.unsqueeze(1)


def _scores(block: Block) -> Tensor:
    """The capped scores [H_kv, G, R, K], -inf where a key is not seen."""
    precise = precise_dtype(block.q)
    raw = _flat(block.q.to(precise)) @ block.k.to(precise).transpose(1, 2)
    scores = raw.mul_(block.scale / block.softcap).tanh_().mul_(block.softcap)
    scores = _grouped(scores, block)
    return scores if block.seen is None else scores.masked_fill_(~block.seen, float("-inf"))


def _flat(x: Tensor) -> Tensor:
    """[H_kv, G, R, ...] as [H_kv, G * R, ...]: the queries of a group's heads one after another."""
    return x.flatten(1, 2)


def _grouped(x: Tensor, block: Block) -> Tensor:
    """The way back from `_flat`."""
    return x.unflatten(1, block.q.shape[1:3])
