"""Attention of one head in fp64, forward and backward, a block of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024  # queries at a time, so that long rows fit in memory


def attend_precisely(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of q, k and v, from the definition of softmax attention.

    Args:
        q: queries [L, D], like k, v and the output's gradient dout.
        k: keys.
        v: values.
        dout: gradient of the output.
        dense: bool [L, L], True where the query sees the key.

    Returns:
        out, dq, dk and dv, [L, D], fp64.
    """
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = q.shape[1] ** -0.5
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    for start in range(0, q.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = (scale * q[rows] @ k.T).masked_fill_(~dense[rows], float("-inf"))
        weights = torch.softmax(scores, dim=1)
        out[rows] = weights @ v
        delta = (dout[rows] * out[rows]).sum(1, keepdim=True)
        dscores = weights * (dout[rows] @ v.T - delta) * scale
        dq[rows] = dscores @ k
        dk += dscores.T @ q[rows]
        dv += weights.T @ dout[rows]
    return out, dq, dk, dv
