"""What training steps compute, for the Trainer's log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch

from flexmask.tree.layout import IGNORE_INDEX


def count_batch(batch: dict[str, Any]) -> torch.Tensor:
    """(trained tokens, tokens, tokens of N-pass, places in rows) of a batch, int64 [4].

    On the device of the batch, which is not waited for. All 0 where the batch does not say how many
    samples hold a token.
    """
    counts = batch.get("sample_counts")
    if counts is None:
        return batch["shift_labels"].new_zeros(4)
    trained = batch["shift_labels"] != IGNORE_INDEX
    places = torch.full_like(counts[0, 0], counts.numel(), dtype=torch.int64)
    return torch.stack([trained.sum(), (counts > 0).sum(), counts.sum(), places])


class Throughput:
    """Sums over the steps since the last log, and the seconds that they took.

    Attributes:
        predictions: (right, summed entropies) as of `count_predictions`, of this process alone,
            added up on the device; None where they are not counted.
    """

    def __init__(self) -> None:
        self.predictions: Sequence[torch.Tensor] | None = None
        self._sums = np.zeros(4)
        self._since: float | None = None  # the first step

    def add(self, counts: Sequence[float]) -> None:
        """Count a step that begins: the sums of `count_batch` over its batches and processes."""
        self._sums += counts
        self._since = self._since or perf_counter()

    def add_predictions(self, counts: Sequence[torch.Tensor]) -> None:
        """Count the predictions of a batch."""
        if self.predictions is not None:
            counts = [a + b for a, b in zip(self.predictions, counts, strict=True)]
        self.predictions = counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose seconds are not those of a step."""
        start = perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += perf_counter() - start

    def take(
        self, sum_over_processes: Callable[[Sequence[float]], list[float]]
    ) -> dict[str, float]:
        """What is logged of the steps, which are forgotten; nothing where none were counted."""
        trained, tokens, npass_tokens, places = self._sums.tolist()
        if not tokens or self._since is None:
            return {}
        now = perf_counter()
        seconds = now - self._since
        self._sums[:], self._since = 0, now
        logs = {
            "trained_tokens_per_second": trained / seconds,
            "npass_tokens_per_second": npass_tokens / seconds,
            "row_fill": tokens / places,
            "npass_ratio": npass_tokens / tokens,
        }
        if self.predictions is not None:
            right, entropies = sum_over_processes([float(value) for value in self.predictions])
            logs |= {"mean_token_accuracy": right / trained, "entropy": entropies / trained}
            self.predictions = None
        return logs
