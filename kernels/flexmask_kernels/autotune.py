"""Measure configurations on this machine: `python -m flexmask_kernels.autotune --width 128`.

Each kernel is timed on a row of packed conversations, alone, with every candidate; the fastest is
kept on disk (see `tuning`). Minutes of compiling, once for a chip, a dtype and a head width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flexmask_kernels import launch
from flexmask_kernels.configs import Config
from flexmask_kernels.tuning import choose_config, config_key, forced_configs, save_config

Clock = Callable[[Callable[[], object]], float]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def candidates(kernel: str, q: Tensor, v: Tensor) -> list[Config]:
    """The configurations worth a try: the current one first, then tiles, warps and stages."""
    tiles = [(128, 128), (128, 64), (64, 64), (64, 32), (32, 32)]
    if kernel in ("backward_keys", "backward_fused"):
        tiles = [(block_q, block_k) for block_k, block_q in tiles]
    options = product(tiles, (4, 8), (1, 2, 3, 4))
    others = [Config(*tile, warps, stages) for tile, warps, stages in options]
    current = choose_config(kernel, q, v)
    return [current, *(config for config in others if config != current)]


def autotune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    *,
    clock: Clock = triton.testing.do_bench,
    try_out: Callable[[str, Tensor, Tensor], Iterable[Config]] = candidates,
) -> dict[str, tuple[Config, float]]:
    """Time every kernel with its candidates, save and return the fastest, with milliseconds.

    Args:
        q: queries [B, H, L, D], of a size that fills the device.
        k: keys [B, H_kv, L, D].
        v: values [B, H_kv, L, D_v].
        end: int32 [B, L] or [1, L], subtree ends of a typical row.
        clock: milliseconds that a function takes.
        try_out: the candidates of a kernel.
    """
    inputs, options = launch.Inputs(q, k, v, end), launch.Options(q.shape[-1] ** -0.5)
    out, lse2 = launch.forward(inputs, options)
    dout = torch.randn_like(out)

    def forward() -> object:
        return launch.forward(inputs, options)

    def backward(*, deterministic: bool) -> object:
        return launch.backward(dout, inputs, out, lse2, options, deterministic=deterministic)

    # where a pass runs two kernels, the one that does not change adds a constant to all times
    passes = {
        "forward": forward,
        "backward_queries": partial(backward, deterministic=True),
        "backward_keys": partial(backward, deterministic=True),
        "backward_fused": partial(backward, deterministic=False),
    }

    results = {}
    for kernel, run in passes.items():
        times = {}
        for config in try_out(kernel, q, v):
            with forced_configs({kernel: config}):
                try:
                    times[config] = clock(run)
                except OutOfResources:
                    continue
        best = min(times, key=times.__getitem__)
        save_config(config_key(kernel, q, v), best)
        results[kernel] = best, times[best]
    return results


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
    args = parser.parse_args()
    (H, H_kv), L = args.heads, args.tokens

    def draw(heads: int, width: int) -> Tensor:
        x = torch.randn(1, L, heads, width, dtype=_DTYPES[args.dtype], device="cuda")
        return x.transpose(1, 2)

    value_width = args.value_width or args.width
    q, k, v = draw(H, args.width), draw(H_kv, args.width), draw(H_kv, value_width)
    for kernel, (config, elapsed_ms) in autotune(q, k, v, typical_row(L, "cuda")).items():
        print(f"{kernel}: {config}, {elapsed_ms:.3f} ms")


if __name__ == "__main__":
    main()
