"""The parts of the kernels' benchmark, one call each: names and numbers in, plain data out.

Each can be called in a process that has seen none of the others.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from flexmask_kernels.autotune import autotune
from flexmask_kernels.configs import KERNELS, Config
from flexmask_kernels.tuning import choose_config, config_key, save_config
from torch import Tensor
from triton import TritonError

from benchmarks.attention_runs import Inputs
from benchmarks.environment import device
from benchmarks.kernel_checks import Bounds, check_baseline, check_kernels, first_group
from benchmarks.kernel_cost import Shape, kernel_cost, varlen_cost
from benchmarks.kernel_methods import LeftOutError, Method, build_method
from benchmarks.kernel_rows import KernelRow, named_row, row_names
from benchmarks.record import Row
from benchmarks.subprocess_calls import reason_of
from benchmarks.timing import Task, alternate, queue_seconds

_FAILURES = (RuntimeError, ImportError, ValueError, TypeError, TritonError, LeftOutError)
OURS = ("triton", "triton_split", "varlen")
SLOWER = {"triton": "slower", "varlen": "slower_than_varlen"}  # ratios to two of ours


class Sizes(NamedTuple):
    """What a quick run has smaller."""

    heads: tuple[int, int]
    dtype: torch.dtype
    rounds: int
    is_quick: bool


FULL = Sizes((32, 8), torch.bfloat16, 5, False)
QUICK = Sizes((2, 1), torch.float16, 1, True)


def measure_ceilings() -> dict[str, float]:
    """What the device itself reaches: a product of bf16 matrices, a copy in its memory."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device()) for _ in range(2))
    x = torch.randn(2**29, device=device())  # 2 GiB, many times the cache
    y = torch.empty_like(x)
    tasks = {"product": Task(lambda: a @ b), "copy": Task(lambda: y.copy_(x))}
    for task in tasks.values():
        task.run()
    took = alternate(tasks, rounds=5, label="ceilings", device=device())
    product, copy = (sorted(took[name])[2] for name in ("product", "copy"))
    return {
        "product_tflops": round(2 * 8192**3 / product / 1e12, 1),
        "copy_tb_per_s": round(2 * x.numel() * 4 / copy / 1e12, 3),
    }


def describe(name: str, width: int, sizes: Sizes) -> Row:
    """A row before anything of it is measured: its sizes, and what the kernels do for it."""
    row = _row(name)
    H, H_kv = sizes.heads
    like = torch.empty(1, 1, 1, width, dtype=sizes.dtype, device=device())
    shape = Shape(H, H_kv, width, width, like.element_size())
    costs = {}
    for kernel in KERNELS:
        config = choose_config(kernel, like, like)
        cost = kernel_cost(kernel, row.mask, config, shape)
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
        "gather": varlen_cost(row.mask, shape),
        "bounds": None,
        **{kind: {"forward": {}, "backward": {}} for kind in ("elapsed_s", "tflops", "host_s")},
        **{kind: {"forward": {}, "backward": {}, "both": {}} for kind in SLOWER.values()},
    }


def check_ours(name: str, width: int, sizes: Sizes) -> dict[str, Any]:
    """What `check_kernels` finds of both modes on a row."""
    row = _row(name)
    return check_kernels(row, _draw(row, width, sizes), f"{row.name}, D {width}", OURS)


def measure(
    name: str, width: int, sizes: Sizes, names: Sequence[str], bounds: Bounds
) -> dict[str, Any]:
    """Seconds of the methods `names` of a row, in turns; the first is one of ours.

    Returns:
        `took`, {direction: {method: seconds of each round}}; on a GPU `host`, seconds to queue a
        call; `left_out`, {method: reason}.
    """
    row = _row(name)
    inputs = _draw(row, width, sizes)
    methods: dict[str, Method] = {names[0]: build_method(names[0], row, inputs)}
    left_out: dict[str, str] = {}
    ours = first_group(methods[names[0]], row)
    for other in names[1:]:
        try:
            method = build_method(other, row, inputs)
            check_baseline(method, row, ours, bounds)
        except _FAILURES as failure:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a broken device raises again, and ends the process
            known = isinstance(failure, LeftOutError)
            left_out[other] = str(failure) if known else reason_of(failure)
        else:
            methods[other] = method
    if len(methods) == 1 and not set(names) <= set(OURS):
        methods = {}  # there is nothing to compare
    outs = {n: method.forward() for n, method in methods.items() if method.no_backward is None}
    tasks = {
        "forward": {n: Task(method.forward) for n, method in methods.items()},
        "backward": {n: Task(lambda n=n: methods[n].backward(outs[n])) for n in outs},
    }
    label = f"{name}, D {width}"
    took = {
        direction: alternate(named, rounds=sizes.rounds, label=label, device=device())
        for direction, named in tasks.items()
    }
    host = {
        direction: {n: queue_seconds(task) for n, task in named.items()}
        for direction, named in tasks.items()
        if device() == "cuda"
    }
    for n, method in methods.items():
        if method.no_backward is not None:
            left_out[f"{n}, backward"] = method.no_backward
    return {"took": took, "host": host, "left_out": left_out}


def tune(kernel: str, width: int, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """Measure a kernel's candidates on the first row: the choice, and every trial.

    The choice goes to the cache of configurations; a quick run has two candidates and keeps none.
    """
    inputs, end = _first_inputs(width, sizes)
    q, k, v = (x.detach() for x in inputs[:3])
    if sizes.is_quick:
        pair = [Config(16, 16, 1, 1), Config(16, 32, 1, 1)]
        clocks = (lambda run: run() and 1.0,) * 2
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.dict(os.environ, FLEXMASK_CACHE=folder),
        ):
            found = autotune(
                *(q, k, v, end), kernels=[kernel], clocks=clocks, try_out=lambda *_: pair
            )
    else:
        found = autotune(q, k, v, end.to(q.device), kernels=[kernel], limit_s=limit_s)
    tuned = found[kernel]
    return {
        "config": list(tuned.config),
        "elapsed_ms": tuned.elapsed_ms,
        "num_candidates": tuned.num_candidates,
        "trials": [[list(t.config), t.elapsed_ms, t.failure] for t in tuned.trials],
    }


def keep(kernel: str, width: int, sizes: Sizes, config: list[Any]) -> None:
    """Use a configuration that an earlier run has measured."""
    inputs, _ = _first_inputs(width, sizes)
    save_config(config_key(kernel, inputs.q, inputs.v), Config(*config))


_row = cache(named_row)  # each in a process once


def _first_inputs(width: int, sizes: Sizes) -> tuple[Inputs, Tensor]:
    """Inputs of the first row, and its subtree ends."""
    row = _row(row_names(quick=sizes.is_quick)[0])
    return _draw(row, width, sizes), row.mask.subtree_end


def _draw(row: KernelRow, width: int, sizes: Sizes) -> Inputs:
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
