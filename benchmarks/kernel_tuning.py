"""The configurations of the kernels, measured before the kernels are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from flexmask_kernels.autotune import autotune
from flexmask_kernels.configs import Config
from flexmask_kernels.tuning import config_key, save_config

from benchmarks.kernel_parts import Sizes, draw_inputs


def tune(kernel: str, width: int, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """Measure a kernel's candidates on the first row: the choice, and every trial.

    The choice goes to the cache of configurations; a quick run has two candidates and keeps none.
    """
    inputs, end = draw_inputs(width, sizes)
    q, k, v = (x.detach() for x in inputs[:3])
    if sizes.is_quick:
        pair = [Config(16, 16, 1, 1), Config(16, 32, 1, 1)]
        with _throwaway_cache():
            found = autotune(
                *(q, k, v, end),
                kernels=[kernel],
                clocks=(lambda run: run() and 1.0,) * 2,
                try_out=lambda *_: pair,
            )
    else:
        found = autotune(q, k, v, end.to(q.device), kernels=[kernel], limit_s=limit_s)
    tuned = found[kernel]
    return {
        "config": list(tuned.config),
        "elapsed_ms": tuned.elapsed_ms,
        "num_candidates": tuned.num_candidates,
        "trials": [[list(t.config), t.elapsed_ms, t.failure] for t in tuned.trials],
    }


def keep(kernel: str, width: int, sizes: Sizes, config: list[Any]) -> None:
    """Use a configuration that an earlier run has measured."""
    inputs, _ = draw_inputs(width, sizes)
    save_config(config_key(kernel, inputs.q, inputs.v), Config(*config))


@contextmanager
def _throwaway_cache() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, FLEXMASK_CACHE=folder),
    ):
        yield
