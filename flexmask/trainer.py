"""The Hugging Face Trainer on packed rows: weighted losses, normalised over the whole step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from flexmask.errors import UnsupportedModelError
from flexmask.layout import IGNORE_INDEX


class TreeTrainer(Trainer):
    """A Trainer whose loss is divided by the loss weights of the whole optimizer step.

    The stock Trainer counts trained positions instead, which is the same for the weighting "token"
    and wrong for "turn" and "conversation". The sum runs over accumulated batches and processes.
    """

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor:
        if self.args.n_gpu > 1:
            raise UnsupportedModelError(
                f"torch.nn.DataParallel would cut a packed row in {self.args.n_gpu}; "
                "start one process per GPU with torchrun, or show it one GPU"
            )
        total = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            if "loss_weights" in batch:
                total += batch["loss_weights"].sum().double().cpu()
            else:
                total += (batch["shift_labels"] != IGNORE_INDEX).sum().cpu()
        items = total.float().to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            items = self.accelerator.gather(items).sum()
        return items
