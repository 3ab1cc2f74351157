"""One way of training, in a process of its own, so that its memory can be measured.

Two workers get the same conversations step by step, and add up the gradients of one sequence after
another: "single-pass" takes the trees of the conversations, through a patched model, and "N-pass"
their samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from typing import Any, NamedTuple

import numpy as np

from flexmask.demo import CONFIG_PATH
from flexmask.tools.peak import peak_bytes, reset_peak
from flexmask.tree.sample import Sample

SINGLE_PASS = "single-pass"
N_PASS = "N-pass"
LEARNING_RATE = 1e-3


class ModeResult(NamedTuple):
    """What training in one mode came to.

    Attributes:
        figures: tokens, seconds, memory and losses, as report.json has them.
        losses: of each step, nats per trained token.
        gradients: name to gradient, before the first update.
    """

    figures: dict[str, float]
    losses: list[float]
    gradients: dict[str, np.ndarray]


class Worker:
    """A model with random weights in one mode, SINGLE_PASS or N_PASS, and its optimizer."""

    def __init__(self, mode: str, vocab_size: int, seed: int) -> None:
        import torch
        from transformers import AutoConfig, set_seed

        from flexmask.model import patch
        from flexmask.model.load import random_model

        set_seed(seed)
        config = AutoConfig.from_pretrained(CONFIG_PATH)
        config.vocab_size = max(config.vocab_size, vocab_size)
        self.mode = mode
        self.model = random_model(config, torch.float32)
        if mode == SINGLE_PASS:
            patch(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.gradients: dict[str, np.ndarray] = {}
        self.num_tokens = 0
        self.elapsed_s = 0.0
        self.bytes_before = reset_peak()

    def step(self, conversations: list[list[Sample]]) -> None:
        """Train on some conversations."""
        started = time.perf_counter()
        batches = self._batches(conversations)
        num_trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            output = self.model(**batch, num_items_in_batch=num_trained)
            output.loss.backward()
            loss += float(output.loss.detach())
        if not self.losses:
            self.gradients = {
                name: parameter.grad.numpy().copy()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.elapsed_s += time.perf_counter() - started
        self.num_tokens += sum(batch["input_ids"].numel() for batch in batches)
        self.losses.append(loss)

    def result(self) -> ModeResult:
        """What the steps so far came to."""
        figures = {
            "tokens": self.num_tokens,
            "steps": len(self.losses),
            "seconds": self.elapsed_s,
            "peak_memory_mib": (peak_bytes() - self.bytes_before) / 2**20,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }
        return ModeResult(figures, self.losses, self.gradients)

    def _batches(self, conversations: list[list[Sample]]) -> list[dict[str, Any]]:
        from flexmask.model.npass import npass_batches
        from flexmask.packing.collator import TreeCollator

        if self.mode == SINGLE_PASS:
            return [TreeCollator()([samples]) for samples in conversations]
        return [batch for samples in conversations for batch in npass_batches(samples)]


class WorkerProcess(BaseManager):
    """A process of its own, with the `Worker` in it that `worker` makes."""

    worker: Callable[..., Any]


WorkerProcess.register("worker", Worker)
