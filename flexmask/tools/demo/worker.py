"""One way of training, in a process of its own, so that its memory can be measured.

Two workers get the same conversations step by step, and add up the gradients of one sequence after
another: "single-pass" takes the trees of the conversations, through a patched model, and "N-pass"
their samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from typing import Any

import numpy as np

from flexmask.demo import CONFIG_PATH
from flexmask.tools.demo.peak import peak_bytes, reset_peak
from flexmask.tree.sample import Sample

SINGLE_PASS = "single-pass"
N_PASS = "N-pass"
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: nats per trained token, over the whole step.
        num_tokens: tokens that went through the model.
        elapsed_s: seconds for batches, forward, backward and update.
        gradients: name to gradient, before the update, where asked for.
    """

    loss: float
    num_tokens: int
    elapsed_s: float
    gradients: dict[str, np.ndarray] | None


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
        self.bytes_before = reset_peak()

    def peak_bytes(self) -> int:
        """The most bytes that the steps so far have held."""
        return peak_bytes() - self.bytes_before

    def step(self, conversations: list[list[Sample]], wants_gradients: bool) -> StepResult:
        """Train on some conversations; the result has gradients where they are wanted."""
        started = time.perf_counter()
        batches = self._batches(conversations)
        num_trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            output = self.model(**batch, num_items_in_batch=num_trained)
            output.loss.backward()
            loss += float(output.loss.detach())
        gradients = self._gradients() if wants_gradients else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        elapsed_s = time.perf_counter() - started
        num_tokens = sum(batch["input_ids"].numel() for batch in batches)
        return StepResult(loss, num_tokens, elapsed_s, gradients)

    def _batches(self, conversations: list[list[Sample]]) -> list[dict[str, Any]]:
        from flexmask.model.npass import npass_batches
        from flexmask.packing.collator import TreeCollator

        if self.mode == SINGLE_PASS:
            return [TreeCollator()([samples]) for samples in conversations]
        return [batch for samples in conversations for batch in npass_batches(samples)]

    def _gradients(self) -> dict[str, np.ndarray]:
        return {
            name: parameter.grad.numpy().copy()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }


class WorkerProcess(BaseManager):
    """A process of its own, with the `Worker` in it that `worker` makes."""

    worker: Callable[..., Any]


WorkerProcess.register("worker", Worker)
