"""`attention`, and the unchecked `dispatch` beneath it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexmask.backends.cache import per_mask_cache
from flexmask.backends.choice import Call, choose_backend
from flexmask.backends.flex_options import check_kernel_options
from flexmask.backends.reference import reference_attention
from flexmask.errors import MaskError
from flexmask.tree.intervals import check_window, find_window_start

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
    kernel_options: Mapping[str, Any] | None = None,
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
        window: a query sees only keys less than `window` positions before it; None for the mask's
            own window. For layers that differ from each other and share a mask without one; where
            both are given, they must be equal.
        chunk: a query sees only keys of its own chunk of `chunk` positions; None as before.
        backend: "auto", "reference", "cpu", "varlen", "flex" or "triton". A named backend that
            cannot do exactly what is asked raises; `choose_backend` tells what "auto" takes, and
            why.
        kernel_options: FlexAttention's own, such as {"BLOCK_M": 64}, with backend="flex".

    Returns:
        [B, H, L, D_v] in the dtype of q; under autocast in its dtype, to which q, k and v are cast
        as for SDPA.

    Raises:
        MaskError: tensors that do not fit each other, the mask or the backend.
        UnsupportedModelError: an option that the backend does not have.
    """
    q, k, v = (_autocast(x) for x in (q, k, v))
    _check_tensors(q, k, v, sinks)
    _check_mask(q, mask)
    _check_options(scale, softcap)
    check_kernel_options(kernel_options, backend)
    window = _one_of("window", mask.window, window)
    chunk = _one_of("chunk", mask.chunk, chunk)
    check_window(window, chunk)
    return dispatch(
        q,
        k,
        v,
        mask.subtree_end,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        window=window,
        chunk=chunk,
        backend=backend,
        kernel_options=kernel_options,
    )


def dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    backend: str = "auto",
    kernel_options: Mapping[str, Any] | None = None,
) -> Tensor:
    """`attention` without its checks of shapes and values: for callers that hold only tensors.

    It takes a mask's `subtree_end`, int32 [B, L] or [1, L]; the rest is as there.

    Raises:
        MaskError: a backend that does not fit the device.
        UnsupportedModelError: an option that the backend does not have.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    limits: dict[str, Any] = {"window": window, "chunk": chunk}
    widest = max(q.shape[-1], v.shape[-1])
    call = Call(q.dtype, widest, softcap, subtree_end, window, chunk)
    name = choose_backend(q.device, backend, call).name
    # the products of a backend have the dtypes that it chose
    with torch.autocast(q.device.type, enabled=False) if _has_autocast(q) else nullcontext():
        if name == "varlen":  # takes limits as they are
            return _implementation(name)(q, k, v, subtree_end, **options, **limits)
        window_start = None
        if window is not None or chunk is not None:
            window_start = per_mask_cache(find_window_start, subtree_end, **limits)
        if kernel_options is not None:
            options["kernel_options"] = kernel_options
        return _implementation(name)(q, k, v, subtree_end, window_start, **options)


def _implementation(name: str) -> Callable[..., Tensor]:
    if name == "cpu":
        from flexmask.backends.cpu import cpu_attention

        return cpu_attention
    if name == "varlen":
        from flexmask.backends.varlen import varlen_attention

        return varlen_attention
    if name == "flex":
        from flexmask.backends.flex import flex_backend

        return flex_backend
    if name == "triton":
        from flexmask.backends.triton import triton_attention

        return triton_attention
    return reference_attention


def _has_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _autocast(x: Tensor) -> Tensor:
    """The tensor in the dtype of autocast, where that is in force; it leaves fp64 alone."""
    low = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(x, Tensor) or x.dtype not in low or not _has_autocast(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


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


def _check_mask(q: Tensor, mask: TreeMask) -> None:
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


def _one_of(name: str, own: int | None, given: int | None) -> int | None:
    """The mask's own window or chunk, or the one that was given."""
    if own is not None and given is not None and own != given:
        raise MaskError(
            f"{name} must be that of the mask, {own}, got {given}; leave it out, or take a mask "
            "without one"
        )
    return own if given is None else given


def _check_options(scale: float | None, softcap: float | None) -> None:
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None and not 0 < factor < inf:
            raise MaskError(
                f"{name} must be above 0 and finite, got {factor}; leave it out for none"
            )


def _check_shape(name: str, x: Tensor, dims: str, expected: list[int]) -> None:
    if list(x.shape) != expected:
        raise MaskError(f"{name} must be {dims} = {expected}, got {list(x.shape)}")


__all__ = ["attention", "dispatch"]
