"""The Triton kernels and `varlen` against all else that computes the same attention on a GPU.

Every part of the run is a call of `kernel_parts`, on a GPU in a process of its own. What fails,
hangs or is wrong is written down with its reason, and the rest goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flexmask_kernels.configs import KERNELS

from benchmarks import kernel_parts
from benchmarks.environment import device
from benchmarks.kernel_methods import METHODS
from benchmarks.kernel_parts import FULL, OURS, QUICK, SLOWER, Sizes
from benchmarks.kernel_report import draw, tables, targets
from benchmarks.kernel_rows import row_names
from benchmarks.record import Check, Measurement, Record, Row
from benchmarks.subprocess_calls import CallFailedError, Subprocess
from benchmarks.timing import ratios, spread

TITLE = "Attention on a GPU"
ABOUT = """\
Attention of one packed row, forward and backward, in bf16 with 32 query heads and 8 key heads. A
row holds conversations as its name says ("16 x 60/300/120": turns, and tokens of context, reasoning
and response), packed heavy-first. First the configurations are measured, by
`flexmask_kernels.autotune`; then both modes of the kernels, and `varlen`, are held to fp64 on every
row, by the budget of a plain evaluation in the same dtype, over memory filled with NaN. A baseline
that is wrong, or cannot run, is listed with its reason. "flex" is the backend as users get it;
FlexAttention, tuned, has block masks made beforehand and max-autotune, compiled for each length by
itself. "Paper's order" is the same on the same tokens in the order of arXiv 2504.18246. SDPA has
the mask as numbers to add. Packed N-pass holds the samples end to end, each causal, through torch's
flash kernel: its rates are on its own pairs.

TFLOP/s are on visible pairs, two products forward, five backward, whatever a method does beyond
that; times are the device's own. Ratios are a method's time divided by that of the Triton kernels'
fast mode, or of `varlen`, in turns."""


LIMIT_S = 430.0  # of 8 minutes; what starts in time may run a little longer
NOT_REACHED = "not reached in the time that the run has"
_WIDTHS = (128, 64)
_TUNING_S = 25.0  # for each kernel and head width
_PART_S = 60.0  # for a part that compiles little; a longer one hangs
_COMPILE_S = 150.0  # for a method that torch compiles, and tunes
_CHECK_S, _MEASURED_S, _COMPILED_S = 5.0, 3.0, 30.0  # what a check or a method takes at least
_FIRST = ("npass", "flex_backend", "flex", "dense")
_LATER = ("flex_tma", "flex_paper", "flex_flash")


def why_not(*, quick: bool) -> str | None:
    """The reason why this machine cannot run the case, or None."""
    if device() == "cuda":
        return None
    if not quick:
        return "needs a CUDA device; --quick tries it out on a CPU, with TRITON_INTERPRET=1"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA device, or TRITON_INTERPRET=1 in the environment"
    return None


def measure(
    *, quick: bool, limit_s: float = LIMIT_S, previous: Record | None = None
) -> Iterator[Measurement]:
    """The measurement after each part of it, the most telling figures first.

    Args:
        quick: tiny rows, in this process.
        limit_s: seconds after which nothing new is begun.
        previous: the record of a run that this one goes on with, or None.
    """
    widths, sizes = ((16,), QUICK) if quick else (_WIDTHS, FULL)
    dtype = str(sizes.dtype).removeprefix("torch.")
    measurement = Measurement(
        settings={"num_heads": sizes.heads, "dtype": dtype, "rounds": sizes.rounds},
        details={"tuning": {}, "elapsed_s": 0},
    )
    if previous is not None:
        _go_on_with(previous, measurement)
    before_s, started = measurement.details["elapsed_s"], time.perf_counter()
    with Subprocess() as process:
        call = process.call if device() == "cuda" else call_here
        for _ in _Run(measurement, sizes, call, started + limit_s).parts(widths):
            measurement.details["elapsed_s"] = round(before_s + time.perf_counter() - started)
            if not quick:
                measurement.targets = targets(measurement.rows)
            yield measurement


def call_here(function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
    """The result of a part in this very process, however long it takes: nothing hangs on a CPU."""
    return function(*arguments)


def _go_on_with(previous: Record, measurement: Measurement) -> None:
    """Take over what an earlier run has found; what was wrong there is asked again."""
    measurement.go_on_with(previous)
    for row in measurement.rows:
        for name, reason in row["left_out"].items():
            if name in OURS and reason.startswith("wrong"):
                row["left_out"][name], row["bounds"] = NOT_REACHED, None


@dataclass(frozen=True, slots=True)
class _Run:
    """One run: where its findings go, how a part is called, and when nothing new is begun."""

    measurement: Measurement
    sizes: Sizes
    call: Callable[..., Any]
    deadline: float

    def parts(self, widths: Sequence[int]) -> Iterator[None]:
        """Do everything that is not done yet, part by part."""
        details = self.measurement.details
        if device() == "cuda" and "ceilings" not in details:
            try:
                details["ceilings"] = self.call(kernel_parts.measure_ceilings, limit_s=60)
            except CallFailedError as failure:
                details["ceilings"] = {"failure": str(failure)}
        for width in widths:
            yield from self._tune(details["tuning"].setdefault(str(width), {}), width)
            yield from self._add_rows(width)
            rows = [row for row in self.measurement.rows if row["head_width"] == width]
            for row in rows:
                yield from self._check(row)
                yield from self._measure(row, OURS)
            for name in _FIRST:
                for row in rows:
                    yield from self._measure(row, [name])
        for name in _LATER:
            for row in self.measurement.rows:
                yield from self._measure(row, [name])

    def _left_s(self) -> float:
        return self.deadline - time.perf_counter()

    def _of_row(self, part: Callable[..., Any], row: Row, *arguments: Any, limit_s: float) -> Any:
        """The result of a part of one row."""
        shape = (row["name"], row["head_width"], self.sizes)
        return self.call(part, *shape, *arguments, limit_s=limit_s)

    def _tune(self, tuning: dict[str, Any], width: int) -> Iterator[None]:
        """Choose the configurations of a head width, or take those of an earlier run."""
        for kernel in KERNELS:
            known, shape = tuning.get(kernel, {}), (kernel, width, self.sizes)
            try:
                if "config" in known:
                    self.call(kernel_parts.keep, *shape, known["config"], limit_s=_PART_S)
                elif self._left_s() >= _TUNING_S:
                    limit_s = _TUNING_S + _PART_S
                    tuning[kernel] = self.call(
                        kernel_parts.tune, *shape, _TUNING_S, limit_s=limit_s
                    )
            except CallFailedError as failure:
                tuning[kernel] = {"failure": str(failure)}
            yield

    def _add_rows(self, width: int) -> Iterator[None]:
        """Describe the rows that are not there yet."""
        rows = self.measurement.rows
        known = {(row["name"], row["head_width"]) for row in rows}
        for name in row_names(quick=self.sizes.is_quick):
            if (name, width) not in known:
                row = self.call(kernel_parts.describe, name, width, self.sizes, limit_s=_PART_S)
                rows.append(row | {"left_out": dict.fromkeys(METHODS, NOT_REACHED)})
        yield

    def _check(self, row: Row) -> Iterator[None]:
        """Hold both modes to fp64 on a row; a mode that is wrong has no figure there."""
        if row["bounds"] is not None or self._left_s() < _CHECK_S:
            return
        label = f"{row['name']}, D {row['head_width']}"
        wrong = self.measurement.wrong
        try:
            found = self._of_row(kernel_parts.check_ours, row, limit_s=2 * _PART_S)
        except CallFailedError as failure:
            row["left_out"] |= dict.fromkeys(OURS, f"could not be checked: {failure}")
            wrong.append(f"{label}: {row['left_out'][OURS[0]]}")
        else:
            row["bounds"] = found["bounds"]
            self.measurement.checks += [Check(*check) for check in found["checks"]]
            row["left_out"] |= found["wrong"]
            wrong += [f"{label}, {name}: {what}" for name, what in found["wrong"].items()]
        yield

    def _measure(self, row: Row, names: Sequence[str]) -> Iterator[None]:
        """Measure those of the methods `names` that are open, a baseline beside our fast mode."""
        todo = [name for name in names if row["left_out"].get(name) == NOT_REACHED]
        if row["bounds"] is None or not todo:
            return
        is_compiled = todo[0].startswith("flex")
        if self._left_s() < (_COMPILED_S if is_compiled else _MEASURED_S):
            return
        beside: list[str] = []
        if todo[0] not in OURS:
            right = [name for name in OURS if name not in row["left_out"]]
            beside = [name for name in right if name in SLOWER] or right[:1]
            if not beside:
                row["left_out"] |= dict.fromkeys(
                    todo, "nothing of ours is right to compare it with"
                )
                yield
                return
        limit_s = min(_COMPILE_S if is_compiled else _PART_S, self._left_s() + _PART_S)
        try:
            found = self._of_row(
                *(kernel_parts.measure, row, [*beside, *todo], row["bounds"]), limit_s=limit_s
            )
        except CallFailedError as failure:
            row["left_out"] |= dict.fromkeys(todo, str(failure))
        else:
            _record(row, found["took"], found["host"])
            for name in todo:
                row["left_out"].pop(name)
            row["left_out"] |= found["left_out"]
        yield


def _record(
    row: Row, took: dict[str, dict[str, list[float]]], host: dict[str, dict[str, float]]
) -> None:
    """Add times, rates and ratios; a method keeps its first, ours those of the first turn."""
    pairs: dict[str, int] = {name: row["num_visible"] for name in METHODS}  # noqa: C420 (typed)
    pairs["npass"] = row["num_npass_pairs"]
    for direction, products in (("forward", 2), ("backward", 5)):
        for name, seconds in took[direction].items():
            if name in row["elapsed_s"][direction]:
                continue
            flops = 2 * products * pairs[name] * row["head_width"] * row["num_heads"]
            row["elapsed_s"][direction][name] = spread(seconds)
            row["tflops"][direction][name] = spread([flops / s / 1e12 for s in seconds])
            if direction in host:
                row["host_s"][direction][name] = host[direction][name]
            for ours, kind in SLOWER.items():
                if name != ours and ours in took[direction]:
                    row[kind][direction][name] = spread(ratios(seconds, took[direction][ours]))
    for ours, kind in SLOWER.items():
        if ours in took["backward"]:
            for name in took["backward"].keys() - {ours}:
                whole = [_sum(took["forward"][x], took["backward"][x]) for x in (name, ours)]
                row[kind]["both"][name] = spread(ratios(*whole))


def _sum(forward: list[float], backward: list[float]) -> list[float]:
    return [a + b for a, b in zip(forward, backward, strict=True)]


__all__ = ["ABOUT", "TITLE", "device", "draw", "measure", "tables", "why_not"]
