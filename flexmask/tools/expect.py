"""What a trial of a model is expected to take, said before it begins."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from flexmask.model.load import slow_on_cpu
from flexmask.tools.peak import peak_bytes

_SHAPE = (256, 1024, 1024)  # of a product of matrices


def expected(
    flops: Mapping[torch.dtype, float], num_bytes: float | None, device: torch.device
) -> str:
    """The memory and time of operations on a device, in words; and what makes them slow.

    Both are from below: memory is larger for moments, and a whole model does not reach the rate of
    products of matrices, which the time is that of.

    Args:
        flops: operations, by the type that they are done in.
        num_bytes: that come to those held now, None if not known.
        device: where.
    """
    seconds = sum(count / _rate(dtype, device) for dtype, count in flops.items())
    memory = "memory not known"
    if num_bytes is not None:
        memory = f"at least {(_held_bytes(device) + num_bytes) / 2**30:.1f} GiB"
    text = f"{memory} and {_duration(seconds)} on {device.type}"
    slow = [dtype for dtype in flops if dtype.itemsize == 2 and device.type == "cpu"]
    return "; ".join([text, *(f"{slow_on_cpu(dtype)}, give --dtype float32" for dtype in slow)])


def _held_bytes(device: torch.device) -> int:
    """What is held on a device: on a CPU, by the whole process."""
    if device.type == "cpu":
        return peak_bytes()
    return torch.get_device_module(device).memory_allocated(device)


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in the second of two products of matrices; the first warms up."""
    rows, inner, columns = _SHAPE
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(inner, columns, dtype=dtype, device=device)
    for _ in range(2):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # which waits for a GPU
        elapsed_s = time.perf_counter() - started
    return 2 * rows * inner * columns / elapsed_s


def _duration(seconds: float) -> str:
    """A duration in words, at least a second.

    >>> _duration(0.2), _duration(100), _duration(3000)
    ('1 s', '100 s', '50 min')
    """
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{seconds / 60:.0f} min"
