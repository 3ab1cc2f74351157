"""The plugin for ms-swift: `swift sft --external_plugins $(python -m flexmask.integrations.swift)`.

ms-swift imports this file by its path. Two places of it are registries or hooks (the trainer of a
task, the arguments of the trainer); the pipeline of data is replaced, since it drops all keys of a
message but role and content.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from swift.pipelines.train.sft import SwiftSft
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from transformers import Trainer

from flexmask.errors import UnsupportedModelError
from flexmask.integrations.ending import end_in_one_line
from flexmask.integrations.swift.options import check_options, read_config
from flexmask.model import patch
from flexmask.packing.collator import TreeCollator
from flexmask.training.checks import check_backend, check_token_ids, check_training_arguments
from flexmask.training.data import (
    load_datasets,
    make_batch_sampler,
    make_collator,
    settle_renderer,
)
from flexmask.training.options import TrainConfig, make_renderer
from flexmask.training.stops import add_stops
from flexmask.training.trainer import TreeTrainer

_make_training_arguments = TrainerFactory.get_training_args


class _SwiftTrainer(Seq2SeqTrainer):
    """ms-swift's trainer, without what counts on labels that are not shifted."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of the model itself: ms-swift weighs it by a count of other labels."""
        inputs.pop("compute_loss_func", None)
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    def get_use_logits_to_keep(self, *_: Any) -> bool:
        """False: it would drop other positions than those that predict nothing."""
        return False

    def get_train_dataloader(self) -> Any:
        """The Trainer's own: ms-swift's never comes to the last data where processes share them."""
        return Trainer.get_train_dataloader(self)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        arguments = Path(self.args.output_dir, "args.json")
        if output_dir is not None and arguments.exists():  # ms-swift looks above a checkpoint
            shutil.copy(arguments, output_dir)


class SwiftTreeTrainer(TreeTrainer, _SwiftTrainer):
    """ms-swift's trainer on trees; patches the model, which has its adapters by now."""

    def __init__(self, *, config: TrainConfig, collator: TreeCollator, **kwargs: Any) -> None:
        model, training, train_set = kwargs["model"], kwargs["args"], kwargs["train_dataset"]
        datasets = [data for data in (train_set, kwargs["eval_dataset"]) if data is not None]
        check_token_ids(model, collator.tokenizer, datasets)
        add_stops(model, collator.tokenizer, train_set, training)
        sampler = make_batch_sampler(config, training, train_set, model)
        patch(model, backend=config.backend, kernel_options=config.kernel_options)
        self._collator = collator
        super().__init__(
            batch_sampler=sampler, log_token_metrics=config.log_token_metrics, **kwargs
        )

    def _get_data_collator(self, *_: Any) -> TreeCollator:
        return self._collator

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._update_last_checkpoint_symlink()  # the checkpoint has its name only now


def _training_arguments(args: Any) -> Any:
    """The trainer's arguments of `swift sft`, refused where they would not be exact."""
    check_options(args)
    config = read_config(args)
    training = _make_training_arguments(args)
    check_training_arguments(training, config)
    check_backend(training, config)
    return training


def _prepare_dataset(pipeline: SwiftSft) -> list[Any]:
    """The trees of `swift sft`'s data, for training and evaluation."""
    args, training = pipeline.args, pipeline.args.training_args
    config = read_config(args)
    renderer = make_renderer(config, pipeline.template.tokenizer)
    renderer = settle_renderer(renderer, config, args.resume_from_checkpoint)
    collator = make_collator(renderer, config, training)
    datasets = load_datasets(config, collator, training)
    pipeline._get_trainer_kwargs = lambda: {"config": config, "collator": collator}
    return list(datasets)


end_in_one_line()
if "swift.megatron" in sys.modules:
    raise UnsupportedModelError("megatron has other trainers and models; use `swift sft`")
TrainerFactory.get_training_args = _training_arguments
TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{SwiftTreeTrainer.__name__}"
SwiftSft._prepare_dataset = _prepare_dataset
