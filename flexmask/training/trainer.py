"""The Hugging Face Trainer on packed rows: weighted losses, normalised over the whole step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator
from transformers.trainer_utils import has_length

from flexmask.backends.choice import record_choices
from flexmask.errors import DataError, UnsupportedModelError
from flexmask.model.adapter import is_patched, sequence_group_of
from flexmask.model.checks import check_parallelism
from flexmask.model.logprobs import count_predictions
from flexmask.model.loss import as_bits
from flexmask.packing.collator import TreeCollator
from flexmask.packing.sampler import TreeBatchSampler
from flexmask.training.checkpoints import ResumableTrainer
from flexmask.training.reports import describe_run, report_run
from flexmask.training.sequence_parallel import deal_to_groups
from flexmask.training.throughput import Throughput, count_batch
from flexmask.tree.build import build_tree
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample


class LogEnds(TrainerCallback):
    """Logs the first and the last step of a run too, where every few steps are logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a log after such a step."""
        if args.logging_strategy == "steps" and state.global_step in (1, state.max_steps):
            control.should_log = True


class TreeTrainer(ResumableTrainer):
    """A Trainer whose losses are divided by the loss weights of the whole optimizer step.

    The stock Trainer counts trained positions instead, which is the same for the weighting "token"
    without weights of messages, else wrong. The sum runs over accumulated batches and processes.
    `eval_loss` is the mean over all loss weights of the evaluation data, where the stock Trainer
    takes the mean of its batches' means. Columns of a dataset are left for the collator to read.

    With a `batch_sampler`, that says what is in a batch, in place of the Trainer's batch size.

    Processes that share the tokens of a row, the `sequence_group` of the patched model, are dealt
    the same batches.

    With each loss it logs `trained_tokens_per_second`, of all processes together, each token of a
    tree once; `npass_tokens_per_second`, those that N-pass would compute; `npass_ratio`, how many
    these are for each that was computed; `row_fill`, the share of rows that is no padding; and
    `num_input_tokens_seen`, the tokens of trees since the run began. With `log_token_metrics` also
    `mean_token_accuracy` and `entropy`, over trained tokens; not where the loss is fused, without
    logits. TensorBoard and wandb are told once a run what `describe_run` says.
    """

    _evaluated: list[float] | None = None  # while evaluating: the weighted loss, and the weights

    def __init__(
        self,
        *args: Any,
        batch_sampler: TreeBatchSampler | None = None,
        log_token_metrics: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(kwargs.get("train_dataset"), Iterator):
            raise DataError("train_dataset is an iterator, read once only; make a list of it")
        super().__init__(*args, **kwargs)
        check_parallelism(self.accelerator.parallelism_config)
        model: Any = self.model
        self._ranks = sequence_group_of(model)
        if self._ranks is not None:
            deal_to_groups(self.args, self.accelerator, self._ranks)
        self.batch_sampler = batch_sampler
        self.log_token_metrics = log_token_metrics
        self._throughput = Throughput()
        self._is_reported = False

    @property
    def num_data_processes(self) -> int:
        """How many processes are dealt different batches; others share the rows of these."""
        return self.args.world_size // self._group_size

    @property
    def _group_size(self) -> int:
        """How many processes share the tokens of a row."""
        return 1 if self._ranks is None else self._ranks.size

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the training set, in batches of `batch_sampler` where there is one.

        Else of so many conversations, each once an epoch: where several processes cannot share them
        evenly they are filled up with blanks.

        Raises:
            DataError: there is no collator that makes batches of trees.
            UnsupportedModelError: accelerate would hand the batches out in another way than the
                sampler plans.
        """
        train_set: Any = self.train_dataset
        collator: Any = self.data_collator
        if collator is default_data_collator or type(collator) is DataCollatorWithPadding:
            raise DataError("TreeTrainer was given no data_collator; give TreeCollator(tokenizer)")
        if self.batch_sampler is None:
            if self._repeats(train_set):
                self.train_dataset = self._filled_up(train_set, self._train_batch_size)
            try:
                return super().get_train_dataloader()
            finally:
                self.train_dataset = train_set
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss of steps with what they computed, and no samples per second of the run.

        Batches need not be full of samples.
        """
        logs.pop("train_samples_per_second", None)
        if "loss" in logs:
            logs |= self._throughput.take(self._sum_over_processes)
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch; the first tells the reporters what the run is trained with."""
        if self._is_reported:
            return super().training_step(model, inputs, *args, **kwargs)
        with record_choices() as choices:
            loss = super().training_step(model, inputs, *args, **kwargs)
        chosen = [choice for choice, _ in choices.most_common()]
        report_run(self.callback_handler.callbacks, describe_run(self, inputs, chosen))
        self._is_reported = True
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; in training its predictions are counted where that is asked for."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        is_multiplied = self.args.average_tokens_across_devices and num_items_in_batch is not None
        if self._ranks is not None and is_multiplied:  # by all processes, as if of other batches
            loss = loss / self._group_size
        targets = inputs.get("shift_labels")
        logits = getattr(outputs, "logits", None)
        is_counted = self.log_token_metrics and model.training
        if is_counted and targets is not None and logits is not None:
            targets = targets if self._ranks is None else self._ranks.cut(targets)
            self._throughput.add_predictions(count_predictions(logits, targets))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with `eval_loss` as the weighted mean over all batches and processes."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._evaluated = [0.0, 0.0]
        try:
            with self._throughput.paused():
                output = super().evaluation_loop(dataloader, description, *args, **kwargs)
                loss, weight = self._sum_over_processes(self._evaluated)
        finally:
            self._evaluated = None
        if output.metrics and weight:
            output.metrics[f"{prefix}_loss"] = loss / weight
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate one batch, and add its loss and its weights to the sums.

        Raises:
            UnsupportedModelError: logits are asked for, of which each process has a part.
        """
        if self._ranks is not None and not prediction_loss_only:
            raise UnsupportedModelError(
                "logits of a row are shared among the processes of a sequence_group; evaluate with "
                "prediction_loss_only, and without compute_metrics"
            )
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, *args, **kwargs
        )
        weight = _weight(inputs).item()
        if self._evaluated is not None and loss is not None and weight:
            self._evaluated[0] += loss.item() * weight
            self._evaluated[1] += weight
        return loss, logits, labels

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The evaluation data, filled up with blanks to the same number of batches a process.

        Raises:
            DataError: several processes, and data without a length.
        """
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        held: Any = self.eval_dataset
        if eval_dataset is None:
            eval_dataset = held
        elif isinstance(eval_dataset, str):
            eval_dataset = held[eval_dataset]
        if not has_length(eval_dataset):
            raise DataError(
                "evaluation data must have a length when several processes share it, or its last "
                "conversations would count twice; make a list of it"
            )
        return super().get_eval_dataloader(self._filled_up(eval_dataset, self.args.eval_batch_size))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; each process reads for itself, since rows differ in length."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.dataloader_config.dispatch_batches is None:
            self.accelerator.dataloader_config.dispatch_batches = False

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Any:
        """The loss weights of a step: an integer tensor, or a float where they are no integer.

        A tensor of floats would not do: FSDP and DeepSpeed round these to the type they compute in.
        """
        if self._evaluated is not None:
            return None  # the mean of this batch
        if self.args.n_gpu > 1:
            raise UnsupportedModelError(
                f"torch.nn.DataParallel would cut a packed row in {self.args.n_gpu}; "
                "start one process per GPU with torchrun, or show it one GPU"
            )
        # Read together: each tolist() waits for the device.
        sums = [torch.hstack((_weight(b), count_batch(b))).tolist() for b in batch_samples]
        mine = np.array(sums).reshape(-1, 5).sum(0).tolist()
        totals = self._sum_over_processes(mine)  # each process of a group counts the batch
        items, *counts = (total / self._group_size for total in totals)
        self._throughput.add(counts)
        self.state.num_input_tokens_seen += int(counts[1])
        if not self.args.average_tokens_across_devices:
            items = mine[0]
        return torch.tensor(int(items), device=device) if items == int(items) else items

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: they are counted at the beginning of a step, without padding."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._throughput.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _sum_over_processes(self, values: Sequence[float]) -> list[float]:
        if self.args.world_size == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.gather(mine).reshape(-1, len(values)).sum(0).tolist()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        model: Any = self.model
        if "subtree_end" in inputs and not is_patched(model):
            raise UnsupportedModelError(
                "the model is not patched, and would take a packed row for one sequence; "
                "give TreeTrainer patch(model)"
            )
        weights = inputs.get("loss_weights")
        if weights is not None and weights.dtype == torch.float32:
            # The same bits as integers, which FSDP and DeepSpeed pass on as they are.
            inputs = {**inputs, "loss_weights": as_bits(weights)}
        return super()._prepare_inputs(inputs)

    def _repeats(self, train_set: Any) -> bool:
        """Whether accelerate would fill up the last batches of an epoch with its first data."""
        return (
            self.args.world_size > 1
            and has_length(train_set)
            and isinstance(self.data_collator, TreeCollator)  # others may not take a blank
            and not (self.args.dataloader_drop_last or self.accelerator.split_batches)
        )

    def _filled_up(self, dataset: Any, batch_size: int) -> ConcatDataset:
        """The dataset with blanks, to the same number of batches a process."""
        missing = -len(dataset) % (batch_size * self.num_data_processes)
        blanks = [build_tree([Sample([0], [0.0])])] * missing  # which train nothing
        filled_up: list[Any] = [dataset, blanks]
        return ConcatDataset(filled_up)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        return data_collator


def _weight(batch: dict[str, Any]) -> torch.Tensor:
    """The sum of a batch's loss weights: float64 [], or int64 where each is 0 or 1."""
    if (weights := batch.get("loss_weights")) is not None:
        return weights.sum(dtype=torch.float64)
    return (batch["shift_labels"] != IGNORE_INDEX).sum()
