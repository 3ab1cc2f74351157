"""`attention`, and the unchecked `dispatch` beneath it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexmask.backends.cache import derived
from flexmask.backends.choice import choose_backend
from flexmask.backends.reach import position_floor
from flexmask.backends.reference import reference_attention
from flexmask.errors import MaskError

if TYPE_CHECKING:
    from flexmask.tree.mask import TreeMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which token q sees token k where k <= q < subtree_end[k].

    Differentiable in q, k, v and sinks, and works under `torch.compile(fullgraph=True)`.

    Args:
        q: queries [B, H, L, D]; any strides, here and below.
        k: keys [B, H_kv, L, D], where H is a multiple of H_kv.
        v: values [B, H_kv, L, D_v].
        mask: the mask of B rows of L tokens, or of one row that all B share.
        scale: factor of the scores; D ** -0.5 if None.
        softcap: bounds the scores to softcap * tanh(scores / softcap).
        sinks: [H], one more logit in each softmax's denominator.
        window: a query sees only keys less than `window` positions before it. Positions are
            `mask.position_ids`, not packed indices.
        chunk: a query sees only keys of its own chunk of `chunk` positions, counted likewise.
        backend: "auto", "reference", "cpu", "flex" or "triton". A named backend that cannot do
            exactly what is asked raises; `choose_backend` tells what "auto" takes, and why.

    Returns:
        [B, H, L, D_v] in the dtype of q.

    Raises:
        MaskError: tensors that do not fit each other, the mask or the backend.
        UnsupportedModelError: an option that the backend does not have.
    """
    _check_tensors(q, k, v, sinks)
    _check_mask(q, mask, needs_positions=window is not None or chunk is not None)
    _check_options(scale, softcap, window, chunk)
    return dispatch(
        q,
        k,
        v,
        mask.subtree_end,
        mask.position_ids,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        window=window,
        chunk=chunk,
        backend=backend,
    )


def dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` without its checks of shapes and values: for callers that hold only tensors.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, H_kv, L, D].
        v: values [B, H_kv, L, D_v].
        subtree_end: int32 [B, L] or [1, L].
        position_ids: int [B, L] or [1, L]; needed for a window or chunk only.
        scale: as in `attention`, like all that follow.
        softcap: bound of the scores.
        sinks: logits [H].
        window: in positions.
        chunk: in positions.
        backend: a name, or "auto".

    Returns:
        [B, H, L, D_v].

    Raises:
        MaskError: a backend that does not fit the device.
        UnsupportedModelError: an option that the backend does not have.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    floor = None
    if position_ids is not None and (window is not None or chunk is not None):
        make_floor = partial(position_floor, window=window, chunk=chunk)
        floor = derived(make_floor, position_ids, key=(window, chunk))
    return _implementation(choose_backend(q.device, backend).name)(
        q,
        k,
        v,
        subtree_end,
        None if floor is None else position_ids,
        floor,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )


def _implementation(name: str) -> Callable[..., Tensor]:
    if name == "cpu":
        from flexmask.backends.cpu import cpu_attention

        return cpu_attention
    if name == "flex":
        from flexmask.backends.flex import flex_backend

        return flex_backend
    if name == "triton":
        from flexmask.backends.triton import triton_attention

        return triton_attention
    return reference_attention


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Raise MaskError unless the tensors have shapes, dtypes and devices that fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise MaskError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.numel() == 0:
            raise MaskError(f"{name} must be 4-D and not empty, got {list(x.shape)}")
    B, H, L, D = q.shape
    H_kv = k.shape[1]
    _check_shape("k", k, "[B, H_kv, L, D]", [B, H_kv, L, D])
    _check_shape("v", v, "[B, H_kv, L, D_v]", [B, H_kv, L, v.shape[3]])
    if H % H_kv:
        raise MaskError(f"H must be a multiple of H_kv, got {H} query heads and {H_kv} key heads")
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise MaskError(f"q must be fp64, fp32, bf16 or fp16, got {q.dtype}")
    if sinks is not None:
        _check_shape("sinks", sinks, "[H]", [H])
    others = {"k": k, "v": v} if sinks is None else {"k": k, "v": v, "sinks": sinks}
    for name, x in others.items():
        if x.device != q.device:
            raise MaskError(f"{name} must be on the device of q, {q.device}, got {x.device}")
        if x.dtype != q.dtype and name != "sinks":
            raise MaskError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}; cast it")


def _check_mask(q: Tensor, mask: TreeMask, *, needs_positions: bool) -> None:
    if not hasattr(mask, "subtree_end"):
        raise MaskError(
            f"mask must be a TreeMask, got {type(mask).__name__}; make one with compile_mask, "
            "or TreeMask(subtree_end)"
        )
    B, _, L, _ = q.shape
    if mask.shape not in ((B, L), (1, L)):
        raise MaskError(f"mask must be [B, L] = {[B, L]} or [1, {L}], got {list(mask.shape)}")
    if mask.device != q.device:
        raise MaskError(
            f"mask must be on the device of q, {q.device}, got {mask.device}; "
            f"use mask.to({str(q.device)!r})"
        )
    if needs_positions and mask.position_ids is None:
        raise MaskError("windows and chunks count positions: give TreeMask its position_ids")


def _check_options(
    scale: float | None, softcap: float | None, window: int | None, chunk: int | None
) -> None:
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None and not 0 < factor < inf:
            raise MaskError(
                f"{name} must be above 0 and finite, got {factor}; leave it out for none"
            )
    for name, positions in (("window", window), ("chunk", chunk)):
        if positions is not None and positions < 1:
            raise MaskError(f"{name} must be at least 1, got {positions}; leave it out for none")


def _check_shape(name: str, x: Tensor, dims: str, expected: list[int]) -> None:
    if list(x.shape) != expected:
        raise MaskError(f"{name} must be {dims} = {expected}, got {list(x.shape)}")


__all__ = ["attention", "dispatch"]
