"""Gradients that are asked for more than once of the same graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._functorch import config as functorch_config


@contextmanager
def kept_graphs() -> Iterator[None]:
    """Where `retain_graph=True` works for what backend `flex` has computed, as for everything else.

    The backward pass of a compiled function refuses it, unless a setting of torch tells that no
    memory was given away (`flex` gives none away). Settings hold for a thread, so that the backward
    pass has to run in this one.
    """
    with (
        torch.autograd.set_multithreading_enabled(False),
        functorch_config.patch(donated_buffer=False),
    ):
        yield
