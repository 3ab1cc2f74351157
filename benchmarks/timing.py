"""Side-by-side timing: A B C A B C ..., so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

_ROUND_S = 0.02  # a short function is called again until a round has lasted so long
_MAX_CALLS = 1000


@dataclass(frozen=True, slots=True)
class Task:
    """Something to time.

    Attributes:
        run: what is timed.
        prepare: makes the arguments of each call of `run`, a tuple, outside the timed part.
        rounds: how many rounds it takes part in, where not in all.
    """

    run: Callable[..., object]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    rounds: int | None = None


def alternate(
    tasks: Mapping[str, Task], *, rounds: int, label: str, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of each task, one entry a round; the tasks take turns within a round.

    On "cuda" they are the device's own seconds, of calls that are queued one after another.

    The caller has run each of them once before: checks are its warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    time_round = _time_round if device == "cpu" else _time_round_on_gpu
    with tqdm(total=rounds * len(tasks), desc=label, unit="run", leave=False, disable=None) as bar:
        for number in range(rounds):
            for name, task in tasks.items():
                if task.rounds is None or number < task.rounds:
                    seconds[name].append(time_round(task))
                bar.update()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest, highest and number of `values`, as plain data."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "num_rounds": len(values),
    }


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """The quotients round by round, of the rounds that both took part in."""
    return [a / b for a, b in zip(numerators, denominators, strict=False)]


def scaled(figure: dict[str, float], factor: float) -> dict[str, float]:
    """The spread of values that are `factor` times those of the spread `figure`."""
    return figure | {key: figure[key] * factor for key in ("median", "low", "high")}


def compare(tasks: Mapping[str, Task], ours: str, *, rounds: int, label: str) -> dict[str, Any]:
    """Time tasks in turns, on the CPU.

    Returns:
        `elapsed_s`, the spread of each task's seconds; `speed_up`, by task, the spread of how many
        times faster than it the task `ours` is.
    """
    took = alternate(tasks, rounds=rounds, label=label)
    return {
        "elapsed_s": {name: spread(values) for name, values in took.items()},
        "speed_up": {
            name: spread(ratios(values, took[ours]))
            for name, values in took.items()
            if name != ours
        },
    }


def queue_seconds(task: Task, calls: int = 5) -> float:
    """Seconds that the host needs to queue one call for the GPU."""
    import torch

    arguments = [task.prepare() for _ in range(calls)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    for each in arguments:
        task.run(*each)
    took_s = (time.perf_counter() - started) / calls
    torch.cuda.synchronize()
    return took_s


def _time_round(task: Task) -> float:
    """Mean seconds of one call, over enough calls to be seen on the clock."""
    gc.collect()
    total_s, num_calls = 0.0, 0
    while num_calls == 0 or (total_s < _ROUND_S and num_calls < _MAX_CALLS):
        arguments = task.prepare()
        started = time.perf_counter()
        task.run(*arguments)
        total_s += time.perf_counter() - started
        num_calls += 1
    return total_s / num_calls


def _time_round_on_gpu(task: Task) -> float:
    """Mean seconds of one call on the device, between two of its own marks."""
    import torch

    gc.collect()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    num_calls, total_s = 1, 0.0
    while total_s < _ROUND_S and num_calls <= _MAX_CALLS:
        arguments = [task.prepare() for _ in range(num_calls)]
        torch.cuda.synchronize()
        start.record()
        for each in arguments:
            task.run(*each)
        stop.record()
        torch.cuda.synchronize()
        total_s = start.elapsed_time(stop) * 1e-3
        took_s = total_s / num_calls
        num_calls = max(2 * num_calls, min(_MAX_CALLS, int(1.2 * _ROUND_S / max(took_s, 1e-6))))
    return took_s
