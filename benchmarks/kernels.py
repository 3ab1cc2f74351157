"""The Triton kernels against everything else that computes the same attention on a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from flexmask_kernels.configs import KERNELS, num_head_splits, num_processors
from flexmask_kernels.tuning import choose_config
from torch import Tensor
from triton import TritonError

from benchmarks.attention_runs import Inputs, Results
from benchmarks.budget import Budget
from benchmarks.kernel_checks import Bounds, check_baseline, check_kernels, first_group
from benchmarks.kernel_cost import Shape, kernel_cost
from benchmarks.kernel_report import draw, tables, targets
from benchmarks.kernel_rows import KernelRow, row_makers
from benchmarks.kernel_tuning import tune
from benchmarks.kernel_ways import WAYS, LeftOutError, Way, build_way
from benchmarks.record import Measurement, Row
from benchmarks.timing import Task, alternate, ratios, spread

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

_BUDGET_S = 430.0  # of 8 minutes; what starts in time may run a little longer
_TUNING_S = 45.0  # for each head width
_COMPILE_S = 45.0  # at most, for a way that torch compiles
_SLOW_TO_COMPILE = ("flex", "flex_paper", "flex_tma", "flex_flash")
_FAILURES = (RuntimeError, ImportError, ValueError, TypeError, TritonError, LeftOutError)
_FIRST = ("triton_split", "flex", "npass", "dense")
_LATER = ("flex_paper", "flex_tma", "flex_flash")


class _Sizes(NamedTuple):
    """What a quick run has smaller."""

    widths: Sequence[int]
    heads: tuple[int, int]
    dtype: torch.dtype
    rounds: int


def device() -> str:
    """What the case runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def why_not(*, quick: bool) -> str | None:
    """The reason why this machine cannot run the case, or None."""
    if device() == "cuda":
        return None
    if not quick:
        return "needs a CUDA device; --quick tries it out on a CPU, with TRITON_INTERPRET=1"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA device, or TRITON_INTERPRET=1 in the environment"
    return None


def measure_in_steps(*, quick: bool) -> Iterator[Measurement]:
    """The measurement after each part of it, the most telling figures first.

    Raises:
        CheckFailedError: the kernels are wrong on some row.
    """
    budget = Budget(_BUDGET_S)
    sizes = _Sizes((128, 64), (32, 8), torch.bfloat16, 5)
    if quick:
        sizes = _Sizes((16,), (2, 1), torch.float16, 1)
    dtype = str(sizes.dtype).removeprefix("torch.")
    settings: dict[str, Any] = {"num_heads": sizes.heads, "dtype": dtype, "rounds": sizes.rounds}
    measurement = Measurement(settings=settings | {"budget_s": _BUDGET_S})
    rows = [make() for make in row_makers(quick=quick).values()]
    for width in sizes.widths:
        measurement.settings[f"tuning_D{width}"] = tune(
            _draw(rows[0], width, sizes), rows[0].mask.subtree_end, quick=quick, limit_s=_TUNING_S
        )
    cases = [(row, width) for width in sizes.widths for row in rows]
    bounds = [
        check_kernels(row, _draw(row, width, sizes), f"{row.name}, D {width}", measurement)
        for row, width in cases
    ]
    for row, width in cases:
        measurement.rows.append(_describe(row, width, sizes))
    for names in (_FIRST, _LATER):
        for (row, width), record, bound in zip(cases, measurement.rows, bounds, strict=True):
            _measure(record, row, _draw(row, width, sizes), names, bound, budget, sizes.rounds)
            if not quick:
                measurement.targets = targets(measurement.rows)
            measurement.settings["elapsed_s"] = round(budget.spent_s)
            yield measurement


def _draw(row: KernelRow, width: int, sizes: _Sizes) -> Inputs:
    """Random leaves on the device, as models lay them out: views of [1, L, H, D]."""
    generator = torch.Generator(device()).manual_seed(0)
    H, H_kv = sizes.heads

    def draw(heads: int) -> Tensor:
        shape = (1, row.mask.shape[1], heads, width)
        x = torch.randn(shape, generator=generator, dtype=sizes.dtype, device=device())
        return x.transpose(1, 2)

    q, k, v = (draw(heads).requires_grad_() for heads in (H, H_kv, H_kv))
    dout = draw(H)
    dout[:, :, row.num_used :] = 0  # no loss on padding, which N-pass does not have
    return Inputs(q, k, v, dout)


def _describe(row: KernelRow, width: int, sizes: _Sizes) -> Row:
    """A row before anything of it is measured: its sizes, and what the kernels do for it."""
    H, H_kv = sizes.heads
    like = torch.empty(1, 1, 1, width, dtype=sizes.dtype, device=device())
    shape = Shape(H, H_kv, width, width, like.element_size())
    costs = {}
    for kernel in KERNELS:
        config = choose_config(kernel, like, like)
        num_blocks = math.ceil(row.mask.shape[1] / config.block_k) * H_kv
        splits = num_head_splits(H // H_kv, num_blocks, num_processors(like.device))
        cost = kernel_cost(
            kernel,
            row.mask,
            config,
            shape,
            num_visible=row.mask.num_visible,
            num_splits=splits if kernel == "backward_keys" else 1,
        )
        costs[kernel] = {"config": list(config), **cost._asdict()}
    lengths = [sample.numel() for sample in row.samples]
    return {
        "name": row.name,
        "is_short": row.is_short,
        "head_width": width,
        "num_heads": H,
        "num_tokens": row.mask.shape[1],
        "num_visible": row.mask.num_visible,
        "num_npass_tokens": sum(lengths),
        "num_npass_pairs": sum(n * (n + 1) // 2 for n in lengths),
        "cost": costs,
        "elapsed_s": {"forward": {}, "backward": {}},
        "tflops": {"forward": {}, "backward": {}},
        "slower": {"forward": {}, "backward": {}, "both": {}},
        "left_out": dict.fromkeys(WAYS, "not reached in the time that the run has"),
    }


def _measure(
    record: Row,
    row: KernelRow,
    inputs: Inputs,
    names: Sequence[str],
    bounds: Bounds,
    budget: Budget,
    rounds: int,
) -> None:
    """Measure the ways `names` of a row beside our fast mode, and add them to its record."""
    if not budget.allows(1):
        return
    ways = {"triton": build_way("triton", row, inputs)}
    ours = first_group(ways["triton"], row)
    for name in names:
        if budget.allows(_COMPILE_S if name in _SLOW_TO_COMPILE else 1):
            try:
                ways[name] = _prepared(name, row, inputs, ours, bounds)
            except _FAILURES as failure:
                record["left_out"][name] = _reason(failure)
    label = f"{row.name}, D {record['head_width']}"
    forward = {name: Task(way.forward) for name, way in ways.items() if name != "triton_split"}
    took = {"forward": alternate(forward, rounds=rounds, label=label, device=device())}
    outs = {name: way.forward() for name, way in ways.items() if way.no_backward is None}
    backward = {name: Task(lambda n=name: ways[n].backward(outs[n])) for name in outs}
    took["backward"] = alternate(backward, rounds=rounds, label=label, device=device())
    _record(record, took)
    for name, way in ways.items():
        record["left_out"].pop(name, None)
        if way.no_backward is not None:
            record["left_out"][f"{name}, backward"] = way.no_backward


def _prepared(name: str, row: KernelRow, inputs: Inputs, ours: Results, bounds: Bounds) -> Way:
    """A way that has run once and was right."""
    way = build_way(name, row, inputs)
    check_baseline(way, row, ours, bounds)
    return way


def _record(record: Row, took: dict[str, dict[str, list[float]]]) -> None:
    """Add times, rates and ratios; a way keeps its first figures, ours those of the first turn."""
    pairs: dict[str, int] = {name: record["num_visible"] for name in WAYS}  # noqa: C420 (typed)
    pairs["npass"] = record["num_npass_pairs"]
    for direction, products in (("forward", 2), ("backward", 5)):
        for name, seconds in took[direction].items():
            if name in record["elapsed_s"][direction]:
                continue
            flops = 2 * products * pairs[name] * record["head_width"] * record["num_heads"]
            record["elapsed_s"][direction][name] = spread(seconds)
            record["tflops"][direction][name] = spread([flops / s / 1e12 for s in seconds])
            if name != "triton":
                slower = ratios(seconds, took[direction]["triton"])
                record["slower"][direction][name] = spread(slower)
    for name in took["backward"]:
        if name in took["forward"] and name != "triton":
            whole = [_sum(took["forward"][x], took["backward"][x]) for x in (name, "triton")]
            record["slower"]["both"][name] = spread(ratios(*whole))


def _sum(forward: list[float], backward: list[float]) -> list[float]:
    return [a + b for a, b in zip(forward, backward, strict=True)]


def _reason(failure: Exception) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if isinstance(failure, LeftOutError):
        return lines[0]
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''}"


__all__ = ["ABOUT", "TITLE", "device", "draw", "measure_in_steps", "tables", "why_not"]
