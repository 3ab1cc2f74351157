"""The Triton kernels against everything else that computes the same attention on a GPU.

Every part of the run is a call of `kernel_parts` or `kernel_tuning`, on a GPU in a process apart.
What fails, hangs or is wrong is written down with its reason, and the rest goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from flexmask_kernels.configs import KERNELS

from benchmarks import kernel_parts, kernel_tuning
from benchmarks.apart import Apart, CallFailedError, Here
from benchmarks.budget import Budget
from benchmarks.kernel_parts import FULL, OURS, QUICK, Sizes, device
from benchmarks.kernel_report import draw, tables, targets
from benchmarks.kernel_rows import row_makers
from benchmarks.kernel_ways import WAYS
from benchmarks.record import Check, Measurement, Record, Row
from benchmarks.timing import ratios, spread

TITLE = "Triton kernels"
ABOUT = """\
Attention of one packed row, forward and backward, in bf16 with 32 query heads and 8 key heads. A
row holds conversations as its name says ("16 x 60/300/120": turns, and tokens of context, reasoning
and response), packed heavy-first. First the configurations are measured, by
`flexmask_kernels.autotune`; then both modes of the kernels are held to fp64 on every row, by the
budget of a plain evaluation in the same dtype, over memory filled with NaN. A baseline that is
wrong, or cannot run, is listed with its reason. FlexAttention has block masks that are built
directly, ROWS_GUARANTEED_SAFE and max-autotune, compiled for each length by itself. "Paper's order"
is FlexAttention on the same tokens in the order of arXiv 2504.18246. SDPA has the mask as numbers
to add. Packed N-pass holds the samples end to end, each causal, through torch's flash kernel: its
rates are on its own pairs.

TFLOP/s are on visible pairs, two products forward, five backward, whatever a way does beyond that;
times are the device's own. Ratios are a way's time divided by that of our fast mode, in turns."""


LIMIT_S = 430.0  # of 8 minutes; what starts in time may run a little longer
NOT_REACHED = "not reached in the time that the run has"
_WIDTHS = (128, 64)
_TUNING_S = 25.0  # for each kernel and head width
_PART_S = 60.0  # for a part that compiles little; a longer one hangs
_COMPILE_S = 150.0  # for a way that torch compiles, and tunes
_EXPECTED_S = {"flex": 30.0, "flex_paper": 30.0, "flex_tma": 30.0, "flex_flash": 30.0}
_FIRST = ("npass", "flex", "dense")
_LATER = ("flex_tma", "flex_paper", "flex_flash")

Run = Apart | Here


def why_not(*, quick: bool) -> str | None:
    """The reason why this machine cannot run the case, or None."""
    if device() == "cuda":
        return None
    if not quick:
        return "needs a CUDA device; --quick tries it out on a CPU, with TRITON_INTERPRET=1"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA device, or TRITON_INTERPRET=1 in the environment"
    return None


def measure_in_steps(
    *, quick: bool, limit_s: float = LIMIT_S, previous: Record | None = None
) -> Iterator[Measurement]:
    """The measurement after each part of it, the most telling figures first.

    Args:
        quick: tiny rows, in this process.
        limit_s: seconds after which nothing new is begun.
        previous: the record of a run that this one goes on with, or None.
    """
    budget = Budget(limit_s)
    widths, sizes = ((16,), QUICK) if quick else (_WIDTHS, FULL)
    dtype = str(sizes.dtype).removeprefix("torch.")
    measurement = Measurement(
        settings={"num_heads": sizes.heads, "dtype": dtype, "rounds": sizes.rounds},
        details={"tuning": {}, "elapsed_s": 0},
    )
    before_s = 0.0
    if previous is not None:
        _go_on_with(previous, measurement)
        before_s = measurement.details["elapsed_s"]
    with Apart() if device() == "cuda" else Here() as run:
        for _ in _parts(run, measurement, widths, sizes, budget):
            measurement.details["elapsed_s"] = round(before_s + budget.spent_s)
            if not quick:
                measurement.targets = targets(measurement.rows)
            yield measurement


def _go_on_with(previous: Record, measurement: Measurement) -> None:
    """Take over what an earlier run has found; what was wrong there is asked again."""
    measurement.rows = previous["rows"]
    measurement.checks = [Check(**check) for check in previous["checks"]]
    measurement.details = previous["details"]
    for row in measurement.rows:
        for name, reason in row["left_out"].items():
            if name in OURS and reason.startswith("wrong"):
                row["left_out"][name], row["bounds"] = NOT_REACHED, None


def _parts(
    run: Run, measurement: Measurement, widths: Sequence[int], sizes: Sizes, budget: Budget
) -> Iterator[None]:
    """Do everything that is not done yet, part by part."""
    if device() == "cuda" and "ceilings" not in measurement.details:
        try:
            measurement.details["ceilings"] = run.call(kernel_parts.measure_ceilings, limit_s=60)
        except CallFailedError as failure:
            measurement.details["ceilings"] = {"failure": str(failure)}
    for width in widths:
        tuning = measurement.details["tuning"].setdefault(str(width), {})
        yield from _tune(run, tuning, width, sizes, budget)
        yield from _add_rows(run, measurement, width, sizes)
        rows = [row for row in measurement.rows if row["head_width"] == width]
        for row in rows:
            yield from _check(run, measurement, row, sizes, budget)
            yield from _measure(run, row, OURS, sizes, budget)
        for name in _FIRST:
            for row in rows:
                yield from _measure(run, row, [name], sizes, budget)
    for name in _LATER:
        for row in measurement.rows:
            yield from _measure(run, row, [name], sizes, budget)


def _tune(
    run: Run, tuning: dict[str, Any], width: int, sizes: Sizes, budget: Budget
) -> Iterator[None]:
    """Choose the configurations of a head width, or take those of an earlier run."""
    for kernel in KERNELS:
        known = tuning.get(kernel, {})
        try:
            if "config" in known:
                run.call(kernel_tuning.keep, kernel, width, sizes, known["config"], limit_s=_PART_S)
            elif budget.allows(_TUNING_S):
                tuning[kernel] = run.call(
                    *(kernel_tuning.tune, kernel, width, sizes, _TUNING_S),
                    limit_s=_TUNING_S + _PART_S,
                )
        except CallFailedError as failure:
            tuning[kernel] = {"failure": str(failure)}
        yield


def _add_rows(run: Run, measurement: Measurement, width: int, sizes: Sizes) -> Iterator[None]:
    """Describe the rows that are not there yet."""
    known = {(row["name"], row["head_width"]) for row in measurement.rows}
    for name in row_makers(quick=sizes.is_quick):
        if (name, width) not in known:
            row = run.call(kernel_parts.describe, name, width, sizes, limit_s=_PART_S)
            measurement.rows.append(row | {"left_out": dict.fromkeys(WAYS, NOT_REACHED)})
    yield


def _check(
    run: Run, measurement: Measurement, row: Row, sizes: Sizes, budget: Budget
) -> Iterator[None]:
    """Hold both modes to fp64 on a row; a mode that is wrong has no figure there."""
    if row["bounds"] is not None or not budget.allows(5):
        return
    label = f"{row['name']}, D {row['head_width']}"
    try:
        found = run.call(
            *(kernel_parts.check_ours, row["name"], row["head_width"], sizes), limit_s=2 * _PART_S
        )
    except CallFailedError as failure:
        row["left_out"] |= dict.fromkeys(OURS, f"could not be checked: {failure}")
        measurement.wrong.append(f"{label}: {row['left_out'][OURS[0]]}")
    else:
        row["bounds"] = list(found["bounds"])
        measurement.checks += [Check(*check) for check in found["checks"]]
        row["left_out"] |= found["wrong"]
        measurement.wrong += [f"{label}, {way}: {what}" for way, what in found["wrong"].items()]
    yield


def _measure(
    run: Run, row: Row, names: Sequence[str], sizes: Sizes, budget: Budget
) -> Iterator[None]:
    """Measure those of the ways `names` that are open, a baseline beside our fast mode."""
    todo = [name for name in names if row["left_out"].get(name) == NOT_REACHED]
    if row["bounds"] is None or not todo:
        return
    if not budget.allows(max(_EXPECTED_S.get(name, 3.0) for name in todo)):
        return
    beside: list[str] = []
    if todo[0] not in OURS:
        beside = [name for name in OURS if name not in row["left_out"]][:1]
        if not beside:
            row["left_out"] |= dict.fromkeys(todo, "nothing of ours is right to compare it with")
            yield
            return
    limit_s = _COMPILE_S if todo[0] in _EXPECTED_S else _PART_S
    limit_s = max(_PART_S, min(limit_s, budget.left_s + _PART_S))
    try:
        found = run.call(
            *(kernel_parts.measure, row["name"], row["head_width"], sizes),
            *([*beside, *todo], row["bounds"]),
            limit_s=limit_s,
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
    """Add times, rates and ratios; a way keeps its first figures, ours those of the first turn."""
    pairs: dict[str, int] = {name: row["num_visible"] for name in WAYS}  # noqa: C420 (typed)
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
            if name != "triton" and "triton" in took[direction]:
                slower = ratios(seconds, took[direction]["triton"])
                row["slower"][direction][name] = spread(slower)
    if "triton" in took["backward"]:
        for name in took["backward"].keys() - {"triton"}:
            whole = [_sum(took["forward"][x], took["backward"][x]) for x in (name, "triton")]
            row["slower"]["both"][name] = spread(ratios(*whole))


def _sum(forward: list[float], backward: list[float]) -> list[float]:
    return [a + b for a, b in zip(forward, backward, strict=True)]


__all__ = ["ABOUT", "TITLE", "device", "draw", "measure_in_steps", "tables", "why_not"]
