"""The configurations of the kernels, measured before the kernels are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from flexmask_kernels.autotune import autotune
from flexmask_kernels.configs import Config
from torch import Tensor

from benchmarks.attention_runs import Inputs


def tune(inputs: Inputs, end: Tensor, *, quick: bool, limit_s: float) -> str:
    """Measure every kernel's candidates on a row; says what was chosen, and out of how many.

    The choices go to the cache of configurations; a quick run has two candidates and keeps none.
    """
    q, k, v = (x.detach() for x in inputs[:3])
    if quick:
        pair = [Config(16, 16, 1, 1), Config(16, 32, 1, 1)]
        clock = iter(range(100))
        with _throwaway_cache():
            found = autotune(
                *(q, k, v, end),
                clock=lambda run: (run(), float(next(clock)))[1],
                try_out=lambda *_: pair,
            )
    else:
        found = autotune(q, k, v, end.to(q.device), limit_s=limit_s)
    return "; ".join(
        f"{kernel} {'x'.join(map(str, tuned.config[:2]))}, {tuned.config.num_warps} warps, "
        f"{tuned.config.num_stages} stages{', TMA' * tuned.config.use_tma} "
        f"({tuned.num_tried} of {tuned.num_candidates} tried)"
        for kernel, tuned in found.items()
    )


@contextmanager
def _throwaway_cache() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, FLEXMASK_CACHE=folder),
    ):
        yield
