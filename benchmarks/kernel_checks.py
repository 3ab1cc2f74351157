"""Are the kernels right? Asked of every row in its own dtype, before any figure is taken.

DESIGN: an output or gradient may err by at most twice the error of a plain PyTorch evaluation in
the same dtype against an fp64 reference, plus rounding; no NaN; results are filled with NaN before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention_runs import NAMES, Inputs, Results
from benchmarks.kernel_methods import LeftOutError, Method, build_method
from benchmarks.kernel_rows import KernelRow
from benchmarks.precise import attend_precisely, rows_of_ends

Bounds = Sequence[float]  # of output, dq, dk and dv


def check_kernels(
    row: KernelRow, inputs: Inputs, label: str, names: Sequence[str]
) -> dict[str, Any]:
    """Hold the modes `names` of ours to fp64 on the first key head and its query heads.

    Returns:
        `bounds` of output, dq, dk and dv; `checks`, (name, error, bound) of all that is within its
        bound; `wrong`, by mode, what is not.
    """
    exact = _group_reference(row, inputs, torch.float64)
    plain = _group_reference(row, inputs, inputs.q.dtype)
    eps = torch.finfo(inputs.q.dtype).eps
    bounds = [
        2 * _distance(a, b) + 2 * eps * float(b.abs().max())
        for a, b in zip(plain, exact, strict=True)
    ]
    checks: list[tuple[str, float, float]] = []
    wrong: dict[str, str] = {}
    for name in names:
        with _empty_is_nan():
            ours = first_group(build_method(name, row, inputs), row)
        for what, a, b, bound in zip(NAMES, ours, exact, bounds, strict=True):
            error = _distance(a, b)
            if error <= bound:
                checks.append((f"{what}, {label}, {name}", error, bound))
            else:
                wrong.setdefault(name, f"wrong {what}: {error:.3g} from fp64, at most {bound:.3g}")
    return {"bounds": bounds, "checks": checks, "wrong": wrong}


def check_baseline(method: Method, row: KernelRow, ours: Results, bounds: Bounds) -> None:
    """Compare a method with ours, where both may be off by the bounds; warms it up as well.

    Raises:
        LeftOutError: it is further off, so that its figures would say nothing.
    """
    theirs = first_group(method, row)
    for what, a, b, bound in zip(NAMES, theirs, ours, bounds, strict=False):
        distance = _distance(a[:, : row.num_used], b[:, : row.num_used])
        if not distance <= 2 * bound:
            raise LeftOutError(
                f"wrong {what}: {distance:.3g} from ours, at most {2 * bound:.3g} is rounding"
            )


def first_group(method: Method, row: KernelRow) -> Results:
    """Results of the first key head and its query heads, in packed order."""
    group = method.inputs.q.shape[1] // method.inputs.k.shape[1]
    results = method.results(row.mask.shape[1])
    return tuple(
        x[0, :size].clone() for x, size in zip(results, (group, group, 1, 1), strict=False)
    )


def _group_reference(row: KernelRow, inputs: Inputs, dtype: torch.dtype) -> Results:
    """By definition: out and dq [group, L, D], dk and dv [1, L, D] of the first key head."""
    q, k, v, dout = (x.detach()[0] for x in inputs)
    visible = rows_of_ends(row.mask.subtree_end[0].to(q.device))
    heads = [
        attend_precisely(q[head], k[0], v[0], dout[head], visible, dtype)
        for head in range(q.shape[0] // k.shape[0])
    ]
    out, dq, dk, dv = (torch.stack(column) for column in zip(*heads, strict=True))
    return out, dq, dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Memory that is not written shows: `torch.empty` gives NaN, or an integer out of range."""
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        x = empty(*args, **kwargs)  # type: ignore[call-overload]
        return x.fill_(torch.nan if x.is_floating_point() else 2**30)

    with mock.patch.object(torch, "empty", filled):
        yield
