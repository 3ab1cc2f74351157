"""Peak memory of a function, in a fresh process of its own; only what it needs itself counts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from flexmask.tools.demo.peak import peak_bytes, reset_peak


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
    before = reset_peak()
    value = run()
    connection.send((value, peak_bytes() - before))
