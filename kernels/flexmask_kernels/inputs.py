"""What both passes take, checked and laid out as the kernels read it, and memory for results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexmask_kernels.configs import MAX_WIDTH


class Options(NamedTuple):
    """What changes the scores, apart from the tensors.

    Attributes:
        scale: factor of the scores, above 0.
        softcap: bound of the scores, or None.
    """

    scale: float
    softcap: float | None = None


class Inputs(NamedTuple):
    """The tensors of both passes.

    Attributes:
        q: [B, H, L, D], fp32, bf16 or fp16; any strides, like the next two.
        k: [B, H_kv, L, D].
        v: [B, H_kv, L, D_v].
        end: int32 [B, L] or [1, L], subtree ends.
        start: int32, like `end`, the first token that a query sees; None for all.
        sinks: fp32 [H], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    end: Tensor
    start: Tensor | None = None
    sinks: Tensor | None = None


class Counters(NamedTuple):
    """Tiles visited, int32 [2] each: full ones, partial ones. For tests; counting takes time."""

    forward: Tensor
    backward_queries: Tensor
    backward_keys: Tensor


def prepare(inputs: Inputs) -> Inputs:
    """The inputs as the kernels read them; copies only what has no unit stride in a row."""
    q, k, v, end, start, sinks = inputs
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be fp32, bf16 or fp16, got {q.dtype}")
    widest = max(q.shape[3], v.shape[3])
    if widest > MAX_WIDTH:
        raise ValueError(f"heads must be at most {MAX_WIDTH} wide, got {widest}")
    return Inputs(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        end.to(torch.int32).contiguous(),
        None if start is None else start.to(torch.int32).contiguous(),
        None if sinks is None else sinks.to(torch.float32).contiguous(),
    )


def unit_stride(x: Tensor) -> Tensor:
    """The tensor itself, or a copy whose columns are neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, L, D_v] as a view of [B, L, H, D_v], the layout that models go on with."""
    return empty_gradient(q, v.shape[3])


def empty_gradient(x: Tensor, width: int | None = None) -> Tensor:
    """[B, heads, L, width or x's own] as a view of [B, L, heads, width]."""
    B, heads, L, D = x.shape
    shape = (B, L, heads, width or D)
    return torch.empty(shape, dtype=x.dtype, device=x.device).transpose(1, 2)
