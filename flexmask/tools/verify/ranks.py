"""The processes of a verification that share the tokens of each row, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from torch import distributed

from flexmask.errors import DataError


@contextmanager
def joined(size: int, device: str) -> Iterator[object]:
    """A block in which the `size` processes of this job are a group; None for one.

    All but the first are silent in it.

    Args:
        size: `--sequence_parallel_size`.
        device: the type of the devices that they compute on.

    Raises:
        DataError: there are not so many.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if size != launched:
        raise DataError(
            f"--sequence_parallel_size must be the number of processes, {launched}, got {size}; "
            f"torchrun --nproc-per-node {size} -m flexmask verify ... starts {size}"
        )
    if size == 1:
        yield None
        return
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        if distributed.get_rank() == 0:
            yield distributed.group.WORLD
        else:
            with (
                open(os.devnull, "w") as nowhere,
                redirect_stdout(nowhere),
                redirect_stderr(nowhere),
            ):
                yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()
