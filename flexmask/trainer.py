"""The Hugging Face Trainer on packed rows: weighted losses, normalised over the whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from flexmask.errors import UnsupportedModelError
from flexmask.layout import IGNORE_INDEX
from flexmask.sampler import TreeBatchSampler


class TreeTrainer(Trainer):
    """A Trainer whose loss is divided by the loss weights of the whole optimizer step.

    The stock Trainer counts trained positions instead, which is the same for the weighting "token"
    and wrong for "turn" and "conversation". The sum runs over accumulated batches and processes.

    With a `batch_sampler`, that says what is in a batch, in place of the Trainer's batch size.
    """

    def __init__(
        self, *args: Any, batch_sampler: TreeBatchSampler | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batch_sampler = batch_sampler

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the training set, in batches of `batch_sampler` where there is one.

        Raises:
            UnsupportedModelError: accelerate would hand the batches out in another way than the
                sampler plans.
        """
        if self.batch_sampler is None:
            return super().get_train_dataloader()
        train_set: Any = self.train_dataset
        loader = DataLoader(
            train_set,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.batch_sampler.prepare(loader, self.accelerator)

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
