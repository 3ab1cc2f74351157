"""Which backend computes an attention call, and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from flexmask.backends.cache import per_mask_cache
from flexmask.backends.varlen import why_not
from flexmask.backends.varlen_plan import GatherCost, gather_cost
from flexmask.errors import MaskError, UnsupportedModelError

BACKENDS = ("reference", "cpu", "varlen", "flex", "triton")
# Below so many visible pairs for each gathered key, copying keys costs about as much as attention:
# by a model of an H100 in bf16, with 32 query and 8 key heads of 128, at 3 TB/s and 600 TFLOP/s.
PAIRS_PER_KEY = 150
_HAS_TRITON = find_spec("triton") is not None


class BackendChoice(NamedTuple):
    """A backend's name, and the reason for it in a few words."""

    name: str
    reason: str


class Call(NamedTuple):
    """What `auto` looks at in a call of attention.

    Attributes:
        dtype: of q, k and v.
        width: of the widest head.
        softcap: bound of the scores, or None.
        subtree_end: int [B, L], the mask; None where it is not known.
        window: how many positions a query sees, or None for all.
        chunk: positions of a chunk, or None for one.
    """

    dtype: torch.dtype = torch.bfloat16
    width: int = 128
    softcap: float | None = None
    subtree_end: Tensor | None = None
    window: int | None = None
    chunk: int | None = None


def choose_backend(
    device: torch.device | str, backend: str = "auto", call: Call | None = None
) -> BackendChoice:
    """The backend that `attention(..., backend=backend)` uses for tensors on `device`.

    A backend that is asked for by name is taken or refused, never replaced. On CUDA "auto" takes
    `varlen`, FlashAttention's kernels, where they can do what is asked, and where gathering keys
    costs them less than attention; otherwise `flex`.

    Args:
        device: where q, k and v are.
        backend: "auto" or a name in BACKENDS.
        call: what is asked; None for what most models ask, with a mask that is not known.

    Raises:
        MaskError: an unknown name, or a backend that does not run on `device`.
        UnsupportedModelError: `triton` where the package is not installed.

    >>> choose_backend("cpu")
    BackendChoice(name='cpu', reason='flash kernels on slices, with a backward')
    """
    choice = _choose(torch.device(device), backend, call or Call())
    if not torch.compiler.is_compiling():
        for counts in _recorders:
            counts[choice] += 1
    return choice


_recorders: list[Counter[BackendChoice]] = []


@contextmanager
def record_choices() -> Iterator[Counter[BackendChoice]]:
    """Count what `choose_backend` has chosen, call by call, outside of `torch.compile`."""
    counts: Counter[BackendChoice] = Counter()
    _recorders.append(counts)
    try:
        yield counts
    finally:
        _recorders.remove(counts)


def _choose(device: torch.device, backend: str, call: Call) -> BackendChoice:
    kind = device.type
    if backend == "auto":
        return _automatic(device, call)
    if backend not in BACKENDS:
        raise MaskError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if kind != "cuda" and not (kind == "cpu" and is_interpreting()):
            remedy = "cpu" if kind == "cpu" else "reference"
            raise MaskError(
                f"backend 'triton' needs CUDA tensors, got {kind}; use backend='{remedy}'"
            )
        if not _HAS_TRITON:
            raise UnsupportedModelError(
                "backend 'triton' needs the package triton, which is not installed; "
                "pip install triton, or use backend='flex'"
            )
    if backend == "cpu" and kind != "cpu":
        remedy = "flex" if kind == "cuda" else "reference"
        raise MaskError(f"backend 'cpu' needs CPU tensors, got {kind}; use backend='{remedy}'")
    if backend in ("flex", "varlen") and kind not in ("cpu", "cuda"):
        raise MaskError(
            f"backend {backend!r} needs CUDA or CPU tensors, got {kind}; use backend='reference'"
        )
    return BackendChoice(backend, "asked for by name")


def _automatic(device: torch.device, call: Call) -> BackendChoice:
    if device.type == "cpu":
        return BackendChoice("cpu", "flash kernels on slices, with a backward")
    if device.type != "cuda":
        return BackendChoice("reference", f"the only backend for {device.type} tensors")
    taken = why_not(device, call.dtype, call.width, call.softcap)
    if taken is not None:
        return BackendChoice("flex", f"compiled FlexAttention; 'varlen' takes {taken}")
    if call.subtree_end is not None and not torch.compiler.is_compiling():
        cost: GatherCost = per_mask_cache(
            gather_cost, call.subtree_end, window=call.window, chunk=call.chunk
        )
        if cost.is_gathered and cost.pairs < PAIRS_PER_KEY * cost.keys:
            few = f"'varlen' would gather {cost.keys:,} keys for {cost.pairs:,} pairs"
            return BackendChoice("flex", f"compiled FlexAttention; {few}")
    return BackendChoice("varlen", "FlashAttention's kernels, on gathered paths")


def is_interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
