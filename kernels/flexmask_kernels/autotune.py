"""Measure configurations on this machine: `python -m flexmask_kernels.autotune --width 128`.

Each kernel is timed on a row of packed conversations, alone, with every candidate; the fastest is
kept on disk (see `tuning`). Minutes of compiling, once for a chip, a dtype and a head width.
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
from itertools import product, zip_longest
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from flexmask_kernels.backward_pass import backward
from flexmask_kernels.configs import KERNELS, Config, capability_of
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Inputs, Options
from flexmask_kernels.tuning import choose_config, config_key, forced_configs, save_config

Clock = Callable[[Callable[[], object]], float]

_UNFIT = (OutOfResources, PTXASError)  # a candidate that this chip or its assembler refuses
_SHORT = 256  # tokens of a row that is run for the compiler's sake only
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def candidates(kernel: str, q: Tensor, v: Tensor) -> list[Config]:
    """The configurations worth a try: the current one first, then its neighbours.

    Tiles are (queries, keys). At D = 256 a block of 64 keys spills some registers in the backward
    kernels, but reaches Hopper's wgmma: only a measurement can weigh the two. So it is with TMA.
    """
    width = max(q.shape[3], v.shape[3])
    if kernel in ("forward", "backward_queries"):
        tiles = [(128, 64), (128, 128), (64, 64), (128, 32)]
    else:
        tiles = [(64, 128), (64, 64), (128, 64), (32, 64), (32, 128)]
    if width > 128:
        tiles = [(64, 64), (64, 32), (32, 64), (128, 32), (16, 64)]
    stages = (2, 3) if width <= 128 else (2, 1)
    options = product(tiles, (8, 4), stages)
    current = choose_config(kernel, q, v)
    found = [current, *(Config(*tile, warps, stages) for tile, warps, stages in options)]
    if capability_of(q.device) >= 90:
        with_tma = [config._replace(use_tma=True) for config in found]
        found = [current, with_tma[0], *found[1:], *with_tma[1:]]
    return list(dict.fromkeys(found))


class Tuned(NamedTuple):
    """The fastest configuration of a kernel, its milliseconds, and how many were tried."""

    config: Config
    elapsed_ms: float
    num_tried: int
    num_candidates: int


def autotune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    *,
    clock: Clock = triton.testing.do_bench,
    try_out: Callable[[str, Tensor, Tensor], Iterable[Config]] = candidates,
    limit_s: float = math.inf,
) -> dict[str, Tuned]:
    """Time every kernel with its candidates, save and return the fastest.

    Args:
        q: queries [B, H, L, D], of a size that fills the device.
        k: keys [B, H_kv, L, D].
        v: values [B, H_kv, L, D_v].
        end: int32 [B, L] or [1, L], subtree ends of a typical row.
        clock: milliseconds that a function takes.
        try_out: the candidates of a kernel, the current one first.
        limit_s: seconds for all kernels together. When they are over, what has been tried counts;
            the current configuration of a kernel is always tried.
    """
    started = time.perf_counter()
    inputs, options = Inputs(q, k, v, end), Options(q.shape[-1] ** -0.5)
    L = q.shape[2]
    out, lse2 = forward(inputs, options)
    dout = torch.randn_like(out)

    def run(kernel: str, x: Inputs = inputs, length: int = L) -> None:
        """The pass that holds `kernel`; x holds the first `length` tokens."""
        if kernel == "forward":
            forward(x, options)
            return
        # where a pass runs two kernels, the one that does not change adds a constant to all times
        saved = (out[:, :, :length], lse2[:, :, :length].contiguous())
        is_split = kernel != "backward_fused"
        backward(dout[:, :, :length], x, *saved, options, deterministic=is_split)

    length = min(L, _SHORT)
    short = Inputs(*(x[:, :, :length] for x in (q, k, v)), end[:, :length].clamp(max=length))
    plans = {kernel: list(try_out(kernel, q, v)) for kernel in KERNELS}
    # the first candidates of each kernel come first
    named = ([(kernel, config) for config in configs] for kernel, configs in plans.items())
    pairs = [pair for rank in zip_longest(*named) for pair in rank if pair is not None]
    if q.is_cuda:
        _compile_ahead(partial(run, x=short, length=length), pairs, started + limit_s / 2)
    results = {}
    for number, (kernel, configs) in enumerate(plans.items(), 1):
        until = started + limit_s * (1 + number / len(plans)) / 2
        times: dict[Config, float] = {}
        for config in configs:
            if times and time.perf_counter() > until:
                break
            with forced_configs({kernel: config}):
                try:
                    times[config] = clock(partial(run, kernel))
                except _UNFIT:
                    continue
        best = min(times, key=times.__getitem__)
        save_config(config_key(kernel, q, v), best)
        results[kernel] = Tuned(best, times[best], len(times), len(configs))
    return results


def _compile_ahead(
    run: Callable[[str], None],
    pairs: Sequence[tuple[str, Config]],
    until: float,
) -> None:
    """Fill the caches of compiled code, on all processors; nothing is timed.

    The compiler lets other threads run, and a kernel is compiled for no length, so that a short row
    does. Candidates that are not begun by `until` are compiled when they are timed.
    """

    def compile_one(pair: tuple[str, Config]) -> None:
        if time.perf_counter() > until:
            return
        kernel, config = pair
        with forced_configs({kernel: config}), suppress(*_UNFIT):
            run(kernel)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, pairs))


def typical_row(num_tokens: int, device: str) -> Tensor:
    """Subtree ends int32 [1, L] of conversations of 8 turns: a trunk and 7 branches each."""
    turn, branch = 180, 420  # tokens; a branch leaves the trunk at the end of each turn but one
    trunk = 8 * turn
    whole = trunk + 7 * branch
    token = torch.arange(num_tokens, device=device)
    start, place = token // whole * whole, token % whole
    # the branch that leaves last comes first: token p is seen by those that leave after it
    of_trunk = trunk + (7 - place // turn) * branch
    of_branch = trunk + ((place - trunk) // branch + 1) * branch
    end = start + torch.where(place < trunk, of_trunk, of_branch)
    return end.clamp(max=num_tokens).to(torch.int32).unsqueeze(0)


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
        tried = f"{tuned.num_tried} of {tuned.num_candidates} tried"
        print(f"{kernel}: {tuned.config}, {tuned.elapsed_ms:.3f} ms, {tried}")


if __name__ == "__main__":
    main()
