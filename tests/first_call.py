"""Seconds that a first call compiles for, with an empty cache and no GPU.

Every figure of `python tests/first_call.py` comes from a process of its own, the two ways in turns:
one kernel after the other, as Triton does it, and side by side, as `flexmask_kernels.launches`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

PASSES = ("forward", "fast backward", "deterministic backward")
WAYS = ("in turn", "side by side")


def compile_pass(name, way, capability, width):
    """Print seconds on the clock and of processors, the assembler's included."""
    import torch
    from flexmask_kernels import launches
    from flexmask_kernels.backward_pass import backward
    from flexmask_kernels.forward_pass import forward
    from flexmask_kernels.inputs import Options
    from triton_compile import MASK, absent_gpu, zero_inputs

    inputs, options = zero_inputs(MASK, width), Options(0.1)

    def run_backward():
        saved = (inputs.q, torch.zeros(1, 8, MASK.shape[1]))
        is_split = name.startswith("deterministic")
        backward(inputs.q, inputs, *saved, options, deterministic=is_split)

    with absent_gpu(capability):
        if way == "in turn":
            mock.patch.object(launches, "compile_new").start()
        started = time.perf_counter(), _processor_s()
        run_backward() if name != "forward" else forward(inputs, options)
        print(time.perf_counter() - started[0], _processor_s() - started[1])


def _processor_s():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("PASS", "WAY"), help="compile here and now")
    args = parser.parse_args()
    if args.one:
        compile_pass(*args.one, args.capability, args.width)
        return
    import triton

    print(f"triton {triton.__version__}, sm_{args.capability}, bf16, D = {args.width}")
    paths = [Path(__file__).parent.parent, Path(__file__).parent.parent / "kernels"]
    search = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    for name in PASSES:
        found = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                with tempfile.TemporaryDirectory() as cache:
                    command = [sys.executable, "-W", "ignore", __file__, "--one", name, way]
                    command += ["--capability", str(args.capability), "--width", str(args.width)]
                    environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": search}
                    result = subprocess.run(
                        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
                    )
                found[way].append([float(value) for value in result.stdout.split()])
        for way, pairs in found.items():
            wall, processor = zip(*pairs, strict=True)
            print(
                f"{name}, {way}: {statistics.median(wall):.2f} s (least {min(wall):.2f}), "
                f"processors {statistics.median(processor):.2f} s"
            )


if __name__ == "__main__":
    main()
