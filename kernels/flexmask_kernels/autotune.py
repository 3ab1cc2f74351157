"""Measure configurations on this machine: `python -m flexmask_kernels.autotune --width 128`.

Each kernel is timed on a row of packed conversations, alone, with every candidate; the fastest is
kept on disk (see `tuning`). Minutes of compiling, once for a chip, a dtype and a head width.

A candidate that does not compile, does not fit the chip, or disagrees with the current
configuration by more than rounding is listed with its reason, and is never kept.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import TritonError

from flexmask_kernels.arguments import plan_kernel
from flexmask_kernels.backward_pass import backward, kernels_of
from flexmask_kernels.candidates import candidates, typical_row
from flexmask_kernels.configs import KERNELS, Config
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Inputs, Options
from flexmask_kernels.launches import compiling_only
from flexmask_kernels.tuning import config_key, forced_configs, save_config

Clock = Callable[[Callable[[], object]], float]

# of a candidate: compilers raise RuntimeError, as the device does (which then stays broken)
_FAILURES = (TritonError, RuntimeError)
_FINALISTS = 3  # are timed again, longer
_SHORT = 256  # tokens of a row that is compiled for
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

quick_clock = partial(triton.testing.do_bench, warmup=5, rep=30, return_mode="median")
long_clock = partial(triton.testing.do_bench, warmup=25, rep=150, return_mode="median")


class Trial(NamedTuple):
    """A candidate, and its milliseconds or why it has none."""

    config: Config
    elapsed_ms: float | None
    failure: str = ""


class Tuned(NamedTuple):
    """The fastest configuration of a kernel, its milliseconds, and all that was tried."""

    config: Config
    elapsed_ms: float
    trials: list[Trial]
    num_candidates: int


class DisagreesError(Exception):
    """A candidate's results are not those of the current configuration."""


def autotune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    *,
    kernels: Sequence[str] = KERNELS,
    clocks: tuple[Clock, Clock] = (quick_clock, long_clock),
    try_out: Callable[[str, Tensor, Tensor], Iterable[Config]] = candidates,
    limit_s: float = math.inf,
) -> dict[str, Tuned]:
    """Time kernels with their candidates, save and return the fastest of each.

    Args:
        q: queries [B, H, L, D], of a size that fills the device.
        k: keys [B, H_kv, L, D].
        v: values [B, H_kv, L, D_v].
        end: int32 [B, L] or [1, L], subtree ends of a typical row.
        kernels: which ones, by name.
        clocks: milliseconds that a function takes; a quick one for all, a long one for the best.
        try_out: the candidates of a kernel, the current one first.
        limit_s: seconds for all kernels together. When they are over, what has been tried counts;
            the current configuration of a kernel is always tried.

    Raises:
        RuntimeError: the current configuration fails, or the device does.
    """
    started = time.perf_counter()
    run = _Passes.of(q, k, v, end)
    plans = {kernel: list(try_out(kernel, q, v)) for kernel in kernels}
    if q.is_cuda:
        # the first candidates of each kernel come first
        named = ([(kernel, config) for config in configs] for kernel, configs in plans.items())
        pairs = [pair for rank in zip_longest(*named) for pair in rank if pair is not None]
        compile_ahead(run.short().once, pairs, started + limit_s / 2)
    results = {}
    for number, (kernel, configs) in enumerate(plans.items(), 1):
        until = started + limit_s * (1 + number / len(plans)) / 2
        results[kernel] = _tune(kernel, configs, run, clocks, until)
        save_config(config_key(kernel, q, v), results[kernel].config)
    return results


class _Passes(NamedTuple):
    """The passes that hold each kernel, on one row: what they take and what the forward gave."""

    inputs: Inputs
    options: Options
    out: Tensor
    lse2: Tensor
    dout: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> _Passes:
        """Those of a row."""
        inputs, options = Inputs(q, k, v, end), Options(q.shape[-1] ** -0.5)
        out, lse2 = forward(inputs, options)
        return cls(inputs, options, out, lse2, torch.randn_like(out))

    def planned(self, kernel: str) -> Callable[[], tuple[Tensor, ...]]:
        """The pass that holds `kernel`, planned for its current configuration; gives its results.

        Where a pass runs two kernels, the one that does not change adds a constant to all times.
        """
        if kernel == "forward":
            plan = plan_kernel(kernel, self.inputs, self.options)
            return lambda: forward(self.inputs, self.options, plan)[:1]
        is_split = kernel != "backward_fused"
        plans = {
            name: plan_kernel(name, self.inputs, self.options) for name in kernels_of(is_split)
        }
        saved = (self.dout, self.inputs, self.out, self.lse2, self.options)
        return lambda: backward(*saved, deterministic=is_split, plans=plans)[:3]

    def once(self, kernel: str) -> tuple[Tensor, ...]:
        """The results of that pass."""
        return self.planned(kernel)()

    def short(self) -> _Passes:
        """The same on the first few tokens; the compiled code is for no length."""
        length = min(self.inputs.q.shape[2], _SHORT)
        q, k, v, end = self.inputs[:4]
        q, k, v, out, dout, lse2 = (
            x[:, :, :length] for x in (q, k, v, self.out, self.dout, self.lse2)
        )
        inputs = Inputs(q, k, v, end[:, :length].clamp(max=length))
        return _Passes(inputs, self.options, out, lse2.contiguous(), dout)


def _tune(
    kernel: str,
    configs: Sequence[Config],
    run: _Passes,
    clocks: tuple[Clock, Clock],
    until: float,
) -> Tuned:
    """Try the candidates of one kernel, the current one first."""
    current, *others = configs
    with forced_configs({kernel: current}):
        planned = run.planned(kernel)
        expected = planned()
        trials = [Trial(current, clocks[0](planned))]
    for config in others:
        if time.perf_counter() > until:
            break
        with forced_configs({kernel: config}):
            try:
                planned = run.planned(kernel)
                _check_agreement(planned(), expected)
                trials.append(Trial(config, clocks[0](planned)))
            except (*_FAILURES, DisagreesError) as failure:
                if expected[0].is_cuda:
                    torch.cuda.synchronize()  # a broken device raises again
                reason = str(failure).strip().partition("\n")[0]
                trials.append(Trial(config, None, f"{type(failure).__name__}: {reason[:200]}"))
    quick = {trial.config: trial.elapsed_ms for trial in trials if trial.elapsed_ms is not None}
    times = {}
    for config in sorted(quick, key=quick.__getitem__)[:_FINALISTS]:
        with forced_configs({kernel: config}):
            times[config] = clocks[1](run.planned(kernel))
    best = min(times, key=times.__getitem__)
    return Tuned(best, times[best], trials, len(configs))


def _check_agreement(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise DisagreesError where a token's results differ by more than rounding.

    Both are sums of products of numbers that were rounded to the dtype once or twice, so that they
    are a few roundings apart, in norm. A row of a gradient may cancel to nothing, hence the mean.
    """
    for a, b in zip(results, expected, strict=True):
        size = b.float().norm(dim=-1)
        apart = (a.float() - b.float()).norm(dim=-1) / (size + size.square().mean().sqrt())
        worst, bound = float(apart.max()), 8 * torch.finfo(b.dtype).eps
        if not worst <= bound:
            raise DisagreesError(f"differs from the current one by {worst:.2g} of {bound:.2g}")


def compile_ahead(
    run: Callable[[str], object], pairs: Sequence[tuple[str, Config]], until: float
) -> None:
    """Fill the caches of compiled code, on all processors; nothing is launched.

    The compiler lets other threads run, and a kernel is compiled for no length, so that a short row
    does. Candidates that are not begun by `until` are compiled when they are timed; what fails here
    fails there again.
    """

    def compile_one(pair: tuple[str, Config]) -> None:
        if time.perf_counter() > until:
            return
        kernel, config = pair
        with forced_configs({kernel: config}), compiling_only(), suppress(*_FAILURES):
            run(kernel)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, pairs))


def main() -> None:
    """Measure on the current CUDA device and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--width", type=int, default=128, help="D")
    parser.add_argument("--value_width", type=int, help="D_v; D by default")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="H and H_kv")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS")
    args = parser.parse_args()
    (H, H_kv), L = args.heads, args.tokens

    def draw(heads: int, width: int) -> Tensor:
        x = torch.randn(1, L, heads, width, dtype=_DTYPES[args.dtype], device="cuda")
        return x.transpose(1, 2)

    value_width = args.value_width or args.width
    q, k, v = draw(H, args.width), draw(H_kv, args.width), draw(H_kv, value_width)
    found = autotune(q, k, v, typical_row(L, "cuda"), limit_s=args.limit)
    for kernel, tuned in found.items():
        tried = f"{len(tuned.trials)} of {tuned.num_candidates} tried"
        print(f"{kernel}: {tuned.config}, {tuned.elapsed_ms:.3f} ms, {tried}")
        for trial in tuned.trials:
            if trial.failure:
                print(f"  {trial.config}: {trial.failure}")


if __name__ == "__main__":
    main()
