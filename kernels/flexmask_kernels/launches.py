"""The launches of a pass in order: what is new among them is compiled side by side, then all run.

Triton compiles a kernel when it is launched first, so that a pass with two large kernels would wait
for one after the other. Most of compiling (MLIR, LLVM, the assembler) lets other threads run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

_only_compiles: ContextVar[bool] = ContextVar("launches only compile", default=False)
_compiled: set[Hashable] = set()  # `_code_of` launches that need no look any more


class Launch(NamedTuple):
    """One launch of a kernel: its grid, and its arguments and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class LaunchQueue:
    """Launches that wait for `run`; until then, their outputs are memory and nothing more."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []

    def add(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Put a launch behind those that wait."""
        self._launches.append(Launch(kernel, grid, arguments))

    def run(self) -> None:
        """Launch all in order, on the current stream, and forget them."""
        launches, self._launches = self._launches, []
        if _only_compiles.get():
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments)
            return
        compile_new(launches)
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments)


@contextmanager
def compiling_only() -> Iterator[None]:
    """In here, in this thread, passes compile and launch nothing: their results are any memory."""
    token = _only_compiles.set(True)
    try:
        yield
    finally:
        _only_compiles.reset(token)


def compile_new(launches: Sequence[Launch]) -> None:
    """Compile side by side what these launches need and this process has not seen yet.

    What is not noticed as new here, such as a stride that is no multiple of 16, Triton compiles
    when it is launched, and so it does what failed here: a real error comes again there. (Python
    before 3.11.8 and 3.12.2 may fail to parse in two threads when the garbage collector runs,
    cpython issue 106905.) The interpreter compiles nothing.
    """
    found = {
        _code_of(launch): launch for launch in launches if isinstance(launch.kernel, JITFunction)
    }
    new = found.keys() - _compiled
    if len(new) > 1:
        with (
            ThreadPoolExecutor(len(new)) as threads,
            triton.AsyncCompileMode(threads, ignore_errors=True),
        ):
            # the attention kernels come last in a pass and take longest: they start first
            for code, launch in reversed(found.items()):
                if code in new:
                    launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    _compiled.update(new)


def _code_of(launch: Launch) -> Hashable:
    """What the compiled code depends on: kernel, device, dtypes, constants, options."""
    runtime = _runtime_names(launch.kernel)
    values = [
        (x.dtype, x.device) if isinstance(x, Tensor) else None if name in runtime else x
        for name, x in launch.arguments.items()
    ]
    return (launch.kernel, *values)


@cache
def _runtime_names(kernel: JITFunction) -> frozenset[str]:
    """The parameters that are no compile-time constants."""
    return frozenset(p.name for p in kernel.params if not p.is_constexpr)
