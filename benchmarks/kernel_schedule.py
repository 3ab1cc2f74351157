"""How evenly the programs of a kernel fill a GPU: `python -m benchmarks.kernel_schedule` prints it.

A model, nothing is run. Each processor holds one program at a time, and takes the next one of the
launch order when it is done; a program takes as long as the tiles it visits, and one tile more for
what it loads and stores itself. The time of the last processor is compared with the least there can
be: the mean of all processors or, if that is more, the longest program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapreplace
from typing import NamedTuple

import numpy as np
from flexmask_kernels.configs import KERNELS, NUM_ROUND, default_config, num_head_splits

from benchmarks.kernel_cost import visited_tiles
from benchmarks.kernel_rows import KernelRow, row_makers

ORDERS = ("as in the row", "by key head", "rounds", "overall")
_KEY_KERNELS = ("backward_keys", "backward_fused")
_NUM_HEADS, _NUM_KV_HEADS, _WIDTH = 32, 8, 128
_CAPABILITY, _PROCESSORS = 90, 132  # H200
_OWN = 1.0  # tiles


class Programs(NamedTuple):
    """The programs of one key head.

    Attributes:
        durations: of a program of each line, in tiles.
        num_splits: programs that share a line.
    """

    durations: np.ndarray
    num_splits: int


def programs_of(kernel: str, row: KernelRow) -> Programs:
    """What one key head has to do, with the shipped tiles of an H200."""
    config = default_config(kernel, _CAPABILITY, _WIDTH, 2)
    (tiles,) = visited_tiles(row.mask, None, config.block_q, config.block_k)
    owns_keys = kernel in _KEY_KERNELS
    lines = tiles.key_block if owns_keys else tiles.query_block
    num_lines = math.ceil(row.mask.shape[1] / (config.block_k if owns_keys else config.block_q))
    group = num_splits = _NUM_HEADS // _NUM_KV_HEADS
    if kernel == "backward_keys":
        num_splits = num_head_splits(group, num_lines * _NUM_KV_HEADS, _PROCESSORS)
    visited = np.bincount(lines, minlength=num_lines)
    return Programs(visited * (group // num_splits) + _OWN, num_splits)


def launch_order(programs: Programs, order: str, *, num_round: int = NUM_ROUND) -> np.ndarray:
    """The durations of all key heads' programs as they start, in one of ORDERS.

    "rounds" is that of `turn_of` in `flexmask_kernels.backward_keys`; all others go "by key head".
    """
    durations, num_splits = programs
    if order != "as in the row":
        durations = np.sort(durations)[::-1]
    of_head = np.repeat(durations, num_splits)
    if order == "overall":
        return np.repeat(of_head, _NUM_KV_HEADS)
    size = num_round * num_splits if order == "rounds" else of_head.size
    rounds = [of_head[start : start + size] for start in range(0, of_head.size, size)]
    return np.concatenate([np.tile(part, _NUM_KV_HEADS) for part in rounds])


def makespan(durations: Iterable[float], processors: int) -> float:
    """When the last processor is done, if each takes the next program as soon as it is free."""
    free_at = [0.0] * processors  # a heap
    for duration in durations:
        heapreplace(free_at, free_at[0] + duration)
    return float(max(free_at))


def schedule_table() -> str:
    """The table of docs/kernels.md: times over the least there can be."""
    lines = [
        "| row | kernel | programs | longest | " + " | ".join(ORDERS) + " |",
        "|---" * (4 + len(ORDERS)) + "|",
    ]
    for name, make in row_makers(quick=False).items():
        row = make()
        same: dict[tuple[object, ...], tuple[Programs, list[str]]] = {}
        for kernel in KERNELS:
            owns = "keys" if kernel in _KEY_KERNELS else "queries"
            config = default_config(kernel, _CAPABILITY, _WIDTH, 2)
            programs = programs_of(kernel, row)
            shape = (owns, config.block_q, config.block_k, programs.num_splits)
            same.setdefault(shape, (programs, []))[1].append(f"`{kernel}`")
        for programs, kernels in same.values():
            num_programs = programs.durations.size * programs.num_splits * _NUM_KV_HEADS
            share = programs.durations.mean() * num_programs / _PROCESSORS
            longest = programs.durations.max()
            times = [makespan(launch_order(programs, order), _PROCESSORS) for order in ORDERS]
            figures = " | ".join(f"{time / max(share, longest):.3f}" for time in times)
            lines.append(
                f"| {name} | {', '.join(kernels)} | {num_programs:,} | {longest / share:.2f} "
                f"| {figures} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(schedule_table(), end="")
