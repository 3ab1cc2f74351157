"""Which backend computes an attention call, and why."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

from flexmask.errors import MaskError, UnsupportedModelError

BACKENDS = ("reference", "cpu", "flex", "triton")
_HAS_TRITON = find_spec("triton") is not None


class BackendChoice(NamedTuple):
    """A backend's name, and the reason for it in a few words."""

    name: str
    reason: str


def choose_backend(device: torch.device | str, backend: str = "auto") -> BackendChoice:
    """The backend that `attention(..., backend=backend)` uses for tensors on `device`.

    A backend that is asked for by name is taken or refused, never replaced.

    Args:
        device: where q, k and v are.
        backend: "auto" or a name in BACKENDS.

    Raises:
        MaskError: an unknown name, or a backend that does not run on `device`.
        UnsupportedModelError: `triton` where the package is not installed.

    >>> choose_backend("cpu")
    BackendChoice(name='cpu', reason='flash kernels on slices, with a backward')
    """
    kind = torch.device(device).type
    if backend == "auto":
        return _automatic(kind)
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
                "pip install 'flexmask[triton]' or use backend='flex'"
            )
    if backend == "cpu" and kind != "cpu":
        remedy = "flex" if kind == "cuda" else "reference"
        raise MaskError(f"backend 'cpu' needs CPU tensors, got {kind}; use backend='{remedy}'")
    if backend == "flex" and kind not in ("cpu", "cuda"):
        raise MaskError(
            f"backend 'flex' needs CUDA or CPU tensors, got {kind}; use backend='reference'"
        )
    return BackendChoice(backend, "asked for by name")


def _automatic(kind: str) -> BackendChoice:
    if kind == "cuda":
        return BackendChoice("flex", "compiled FlexAttention; 'triton' has not run on a GPU yet")
    if kind == "cpu":
        return BackendChoice("cpu", "flash kernels on slices, with a backward")
    return BackendChoice("reference", f"the only backend for {kind} tensors")


def is_interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
