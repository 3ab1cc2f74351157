"""What is refused before a run begins: options, folders and tokens that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.backends.choice import choose_backend
from flexmask.errors import DataError, UnsupportedModelError
from flexmask.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def check_output(config: TrainConfig) -> str | None:
    """The checkpoint to resume from, or None to begin.

    Raises:
        DataError: the output folder is not free, and there is nothing in it to resume.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from flexmask.checkpoints import STAGING

    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; name a folder for --output")
    held = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    if not config.resume:
        if held:
            raise DataError(f"{output}: holds another run; use --resume or another --output")
        return None
    checkpoint = get_last_checkpoint(str(output)) if held else None
    if checkpoint is None and held - {STAGING}:
        raise DataError(
            f"{output}: holds files but no checkpoint to resume; empty it, or use another --output"
        )
    return checkpoint


def check_backend(training: TrainingArguments, config: TrainConfig) -> None:
    """Raise MaskError or UnsupportedModelError unless the backend trains on the device."""
    device = training.device
    if choose_backend(device, config.backend).name == "flex" and device.type == "cpu":
        raise UnsupportedModelError(
            "--backend flex has no backward pass on the CPU; use --backend cpu"
        )


def check_training_arguments(training: TrainingArguments, config: TrainConfig) -> None:
    """Raise UnsupportedModelError for Trainer options that packed rows cannot honour exactly.

    And for shares and rates out of range, before anything is read.
    """
    if not 0 <= config.eval_split < 1:
        raise DataError(f"--eval_split must be in [0, 1), got {config.eval_split}")
    if config.eval_split and config.eval_data is not None:
        raise DataError("--eval_data and --eval_split both say what to evaluate on; leave out one")
    if not training.learning_rate >= 0:
        raise DataError(f"--learning_rate must be at least 0, got {training.learning_rate}")
    if training.neftune_noise_alpha:
        raise UnsupportedModelError(
            f"--neftune_noise_alpha must be 0, got {training.neftune_noise_alpha}; "
            "N-pass would draw other noise"
        )
    if getattr(training, "train_sampling_strategy", None) == "group_by_length":
        raise UnsupportedModelError(
            "--train_sampling_strategy group_by_length cannot see the lengths of trees; leave it "
            "out, --max_tokens fills rows by length"
        )
    if config.rows_per_batch is not None:
        if config.rows_per_batch < 1:
            raise DataError(f"--rows_per_batch must be at least 1, got {config.rows_per_batch}")
        if config.max_tokens is None:
            raise UnsupportedModelError(
                "--rows_per_batch fills rows of --max_tokens tokens; give --max_tokens too"
            )
        for option, plain in (
            ("dataloader_drop_last", False),
            ("train_sampling_strategy", "random"),
        ):
            if getattr(training, option, plain) != plain:
                raise UnsupportedModelError(
                    f"--{option} must be {plain}, got {getattr(training, option)}: with "
                    "--rows_per_batch the rows decide, and nothing is dropped"
                )
    if training.label_smoothing_factor:
        raise UnsupportedModelError(
            "--label_smoothing_factor must be 0, got "
            f"{training.label_smoothing_factor}; the Trainer would shift the labels a second time"
        )


def check_token_ids(model: PreTrainedModel, tokenizer: Any, datasets: Sequence[Any]) -> None:
    """Raise DataError if a tree holds a token that the model has no embedding for.

    Trees are looked at only where the tokenizer knows such tokens.
    """
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if max(tokenizer.get_vocab().values()) < size:
        return
    for dataset in datasets:
        highest = max(int(dataset[index].input_ids.max()) for index in range(len(dataset)))
        if highest >= size:
            raise DataError(
                f"token id {highest} must be below the model's vocab_size of {size}; "
                "the tokenizer belongs to another model"
            )
