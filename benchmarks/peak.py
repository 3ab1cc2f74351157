"""Peak memory of a function, in a fresh process of its own; only what it needs itself counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.subprocess_calls import CallFailedError, Subprocess
from flexmask.tools.peak import peak_bytes, reset_peak


class Peak(NamedTuple):
    """What a function returned, and the most bytes it held beyond what was there before."""

    value: Any
    num_bytes: int


def measure_peak(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> Peak:
    """The peak of the function that `prepare(*arguments)` returns, called once.

    Args:
        prepare: a function of a module; imports, inputs and a warm-up are its part.
        arguments: what it takes, such as lengths.

    Raises:
        RuntimeError: the process ended before it answered, as one without memory left does.
    """
    import torch

    with Subprocess() as process:
        try:
            return process.call(_measure, torch.get_num_threads(), prepare, arguments)
        except CallFailedError as failure:
            raise RuntimeError(
                f"{prepare.__name__}{arguments}: {failure}; is there enough memory?"
            ) from None


def _measure(num_threads: int, prepare: Any, arguments: Any) -> Peak:
    import torch

    torch.set_num_threads(num_threads)
    run = prepare(*arguments)
    before = reset_peak()
    return Peak(run(), peak_bytes() - before)
