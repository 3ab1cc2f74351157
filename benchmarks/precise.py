"""Attention of one head from its definition, forward and backward, a block of queries at a time.

In fp64 it is the reference, in a narrower type it is what plain PyTorch makes of that type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 1024  # queries at a time, so that long rows fit in memory


VisibleRows = Callable[[slice], Tensor]  # the lines of a mask bool [L, L] of some queries


def rows_of_ends(end: Tensor) -> VisibleRows:
    """The mask of a row with subtree ends `end` int [L], made a few queries at a time."""
    token = torch.arange(end.numel(), device=end.device)
    return lambda rows: (token <= token[rows, None]) & (token[rows, None] < end)


def attend_precisely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    visible: VisibleRows,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of q, k and v, from the definition of softmax attention.

    Args:
        q: queries [L, D], like k, v and the output's gradient dout.
        k: keys.
        v: values.
        dout: gradient of the output.
        visible: for a slice of queries, bool [queries, L], True where they see the key.
        dtype: of every operation; sums over blocks of queries are in fp32 at least.

    Returns:
        out, dq, dk and dv, [L, D], in `dtype`.
    """
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    scale = q.shape[1] ** -0.5
    out, dq = torch.zeros_like(q), torch.zeros_like(q)
    dk, dv = (torch.zeros_like(x, dtype=_sum_type(dtype)) for x in (k, v))
    for start in range(0, q.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = (q[rows] @ k.T * scale).masked_fill_(~visible(rows), float("-inf"))
        weights = torch.softmax(scores, dim=1)
        out[rows] = weights @ v
        delta = (dout[rows] * out[rows]).sum(1, keepdim=True)
        dscores = weights * (dout[rows] @ v.T - delta) * scale
        dq[rows] = dscores @ k
        dk += dscores.T @ q[rows]
        dv += weights.T @ dout[rows]
    return out, dq, dk.to(dtype), dv.to(dtype)


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
