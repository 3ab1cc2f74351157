"""Peak memory of a function, in a fresh process of its own.

`ru_maxrss` alone would not do: Linux hands the parent's peak on to a child. The high-water mark
of the process's own memory can be set back, so only what the function itself needs is counted.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_answer, args=(theirs, torch.get_num_threads(), prepare, arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        return Peak(*ours.recv())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{prepare.__name__}{arguments} ended with code {process.exitcode} before it answered; "
            "is there enough memory?"
        ) from None
    finally:
        ours.close()
        process.join()


def _answer(connection: Connection, num_threads: int, prepare: Any, arguments: Any) -> None:
    import torch

    torch.set_num_threads(num_threads)
    run = prepare(*arguments)
    before = _reset_peak()
    value = run()
    connection.send((value, _peak_bytes() - before))


def _reset_peak() -> int:
    """Forget the peak so far, where the system can, and return the bytes held now."""
    if not _CLEAR.exists():
        return _peak_bytes()
    _CLEAR.write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no line {name}")
