"""What is refused before a run begins: options, folders and tokens that cannot be used."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError, UnsupportedModelError, need_packages, one_line
from flexmask.files import LOCK, check_folder
from flexmask.training.options import TrainConfig, add_lora
from flexmask.training.sequence_parallel import check_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# Options of the Trainer that have to be left at 0, and why.
_ZERO = {
    "neftune_noise_alpha": "N-pass would draw other noise",
    "label_smoothing_factor": "the Trainer would shift the labels a second time",
}


def check_output(config: TrainConfig) -> str | None:
    """The checkpoint to resume from, or None to begin.

    Raises:
        DataError: the output folder is not free, and there is nothing in it to resume.
    """
    output = Path(config.output)
    check_folder(output, "--output")
    held = {entry.name for entry in output.iterdir()} - {LOCK} if output.is_dir() else set()
    if not config.resume:
        if held:
            raise DataError(f"{output}: holds another run; use --resume or another --output")
        return None
    from transformers.trainer_utils import get_last_checkpoint

    from flexmask.training.checkpoints import STAGING

    checkpoint = get_last_checkpoint(str(output)) if held else None
    if checkpoint is None and held - {STAGING}:
        raise DataError(
            f"{output}: holds files but no checkpoint to resume; empty it, or use another --output"
        )
    return checkpoint


def check_backend(training: TrainingArguments, config: TrainConfig) -> None:
    """Raise MaskError or UnsupportedModelError unless the backend trains on the device."""
    from flexmask.backends.choice import choose_backend

    device = training.device
    if choose_backend(device, config.backend).name == "flex" and device.type == "cpu":
        raise UnsupportedModelError(
            "--backend flex has no backward pass on the CPU; use --backend cpu"
        )


def check_model(training: TrainingArguments, config: TrainConfig) -> None:
    """Raise FlexmaskError for a model that cannot be trained, before the data are read.

    The model is built without weights, as its config describes it, with the adapters asked for.
    """
    import torch
    from transformers import AutoConfig, Trainer

    from flexmask.model.checks import check_model as check_exact
    from flexmask.model.checks import check_sequence_group
    from flexmask.model.load import load_pretrained, meta_model

    what = "model config" if config.from_config else "model"
    settings = load_pretrained(AutoConfig.from_pretrained, config.model, what)
    model = meta_model(settings, torch.float32)
    check_exact(model, model)
    if config.sequence_parallel_size > 1:
        check_sequence_group(model)
    trained = add_lora(model, config) if config.use_peft else model
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, trained)
    except (ImportError, ValueError) as error:
        raise DataError(f"--optim {_value(training.optim)}: {one_line(error)}") from error


def _value(option: Any) -> str:
    """An option of the Trainer as it is written, which keeps some as members of an enumeration."""
    return getattr(option, "value", option)


def _check_lora(config: TrainConfig) -> None:
    if config.use_peft and config.lora_dropout:
        raise UnsupportedModelError(
            f"--lora_dropout must be 0, got {config.lora_dropout}; N-pass would drop others"
        )
    for option in () if config.use_peft else dataclasses.fields(config):
        given = getattr(config, option.name)
        given = tuple(given) if isinstance(given, list) else given
        if ("lora" in option.name or option.name == "load_in_4bit") and given != option.default:
            raise DataError(f"--{option.name} is for runs with adapters; give --use_peft too")


def _check_4bit(training: TrainingArguments, config: TrainConfig) -> None:
    """Raise for a run on quantized weights that cannot be, or has not been held to N-pass."""
    need_packages("--load_in_4bit", "bitsandbytes")
    if config.from_config:
        raise DataError("--load_in_4bit quantizes a checkpoint's weights; leave out --from_config")
    if training.fsdp:
        raise UnsupportedModelError(
            "--load_in_4bit with --fsdp shards packed weights, which has not been held to N-pass; "
            "leave out --fsdp, each process then holds all frozen weights"
        )


def _check_liger(training: TrainingArguments) -> None:
    """Raise for a run on Liger's kernels where these cannot run, or are not there."""
    from transformers.utils import is_liger_kernel_available

    from flexmask.backends.choice import is_interpreting

    if not is_liger_kernel_available():
        raise DataError("--use_liger_kernel needs liger-kernel; pip install liger-kernel")
    if training.device.type == "cpu" and not is_interpreting():
        raise UnsupportedModelError(
            "--use_liger_kernel needs a GPU, got cpu: Liger's kernels are written in Triton; "
            "leave it out"
        )


def check_reports(training: TrainingArguments) -> None:
    """Raise DataError for `--report_to` a package that is not there."""
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    missing = set(training.report_to or ()) - set(get_available_reporting_integrations())
    if "tensorboard" in missing:
        need_packages("--report_to tensorboard", "tensorboard")
    try:
        for make in get_reporting_integration_callbacks(sorted(missing)):
            make()
    except (ImportError, RuntimeError, ValueError) as error:
        raise DataError(f"--report_to: {one_line(error)}") from error


def check_config(config: TrainConfig) -> None:
    """Raise FlexmaskError for our own options that are out of range, or go together with nothing.

    Imports neither torch nor transformers.
    """
    if not 0 <= config.eval_split < 1:
        raise DataError(f"--eval_split must be in [0, 1), got {config.eval_split}")
    if config.eval_split and config.eval_data is not None:
        raise DataError("--eval_data and --eval_split both say what to evaluate on; leave out one")
    if config.eval_data_split is not None and config.eval_data is None:
        raise DataError("--eval_data_split is a split of --eval_data; give that too")
    if config.rows_per_batch is not None and config.max_tokens is None:
        raise UnsupportedModelError(
            "--rows_per_batch fills rows of --max_tokens tokens; give --max_tokens too"
        )
    _check_lora(config)


def _check_evaluation(training: TrainingArguments, config: TrainConfig) -> None:
    if training.eval_strategy != "no" and not config.eval_split and config.eval_data is None:
        raise DataError(
            f"--eval_strategy {_value(training.eval_strategy)} has nothing to evaluate on; give "
            "--eval_data or --eval_split"
        )


def check_training_arguments(training: TrainingArguments, config: TrainConfig) -> None:
    """Raise UnsupportedModelError for Trainer options that packed rows cannot honour exactly.

    And for what is out of range, goes together with nothing, or needs what is not there.
    """
    _check_evaluation(training, config)
    check_reports(training)
    if config.load_in_4bit:
        _check_4bit(training, config)
    if training.use_liger_kernel:
        _check_liger(training)
    if not training.learning_rate >= 0:
        raise DataError(f"--learning_rate must be at least 0, got {training.learning_rate}")
    for option, reason in _ZERO.items():
        if value := getattr(training, option):
            raise UnsupportedModelError(f"--{option} must be 0, got {value}; {reason}")
    if getattr(training, "train_sampling_strategy", None) == "group_by_length":
        raise UnsupportedModelError(
            "--train_sampling_strategy group_by_length cannot see the lengths of trees; leave it "
            "out, --max_tokens fills rows by length"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > training.world_size:
        raise DataError(
            f"WORLD_SIZE is {launched}, but the Trainer sees {training.world_size} process on "
            f"{training.device.type}: each would train a copy of the model; start them with "
            "torchrun, or give --use_cpu for processes without a GPU"
        )
    if training.world_size > 1 and not training.average_tokens_across_devices:
        raise UnsupportedModelError(
            "--average_tokens_across_devices must be true with several processes, got false; each "
            "would weigh the tokens of its own batch, where N-pass weighs those of the whole step"
        )
    check_size(training, config.sequence_parallel_size)
    _check_rows(training, config)


def _check_rows(training: TrainingArguments, config: TrainConfig) -> None:
    if config.rows_per_batch is None:
        return
    for option, only in (("dataloader_drop_last", False), ("train_sampling_strategy", "random")):
        value = getattr(training, option, only)
        if value != only:
            raise UnsupportedModelError(
                f"--{option} must be {only}, got {value}: with --rows_per_batch the rows decide, "
                "and nothing is dropped"
            )


def check_token_ids(model: PreTrainedModel, tokenizer: Any, datasets: Sequence[Any]) -> None:
    """Raise DataError if a tree holds a token that the model has no embedding for.

    Trees are looked at only where the tokenizer knows such tokens.
    """
    from flexmask.model.checks import check_vocabulary

    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if max(tokenizer.get_vocab().values()) < size:
        return
    for dataset in datasets:
        check_vocabulary(size, (dataset[index].input_ids for index in range(len(dataset))))
