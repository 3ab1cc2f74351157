"""Attention of one head from its definition, forward and backward, a block of queries at a time.

In fp64 it is the reference, in a narrower type it is what plain PyTorch makes of that type.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_ROWS = 1024  # queries at a time, so that long rows fit in memory


class DenseRows(Protocol):
    """A dense mask bool [L, L], or something that makes its rows when they are asked for."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class VisibleRows:
    """The dense mask of a row with subtree ends `end` int [L], made a few queries at a time."""

    def __init__(self, end: Tensor) -> None:
        self._end = end
        self._token = torch.arange(end.numel(), device=end.device)

    def __getitem__(self, rows: slice, /) -> Tensor:
        query = self._token[rows, None]
        return (self._token <= query) & (query < self._end)


def attend_precisely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dense: DenseRows,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of q, k and v, from the definition of softmax attention.

    Args:
        q: queries [L, D], like k, v and the output's gradient dout.
        k: keys.
        v: values.
        dout: gradient of the output.
        dense: bool [L, L], True where the query sees the key.
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
        scores = (q[rows] @ k.T * scale).masked_fill_(~dense[rows], float("-inf"))
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
