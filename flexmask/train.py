"""A training run from files: conversations in, a fine-tuned model out, on the HF Trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexmask.collator import TreeCollator
from flexmask.dataset import TreeDataset, load_trees
from flexmask.errors import DataError, UnsupportedModelError
from flexmask.packing import Overflow
from flexmask.prepared import PreparedDataset, is_prepared, open_prepared
from flexmask.weighting import Weighting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What `flexmask train` needs beyond `transformers.TrainingArguments`.

    Attributes:
        model: a model's folder or hub id.
        data: file of conversations, or a folder that `flexmask prepare` made.
        output: folder for checkpoints and the trained model; must be new, or hold a run to resume.
        tokenizer: folder or hub id; the model's own where None.
        chat_template: a Jinja file in place of the tokenizer's template, or None.
        eval_data: file or prepared folder to evaluate on, or None.
        eval_split: share of the conversations of `data` held out for evaluation, in [0, 1).
        max_tokens: budget of a packed row, or None for one row per batch.
        on_overflow, weighting, on_bad_line: as in `TreeCollator` and `load_trees`.
        backend: attention backend, as in `patch`.
        from_config: draw the weights at random from the model's config instead of loading them.
        dtype: data type the model is loaded in: "auto", "float32", "bfloat16" or "float16".
        use_peft, lora_r, lora_alpha, lora_dropout, lora_target_modules: train LoRA adapters only.
        resume: go on from the last checkpoint in `output`.
    """

    model: str
    data: str
    output: str
    tokenizer: str | None = None
    chat_template: str | None = None
    eval_data: str | None = None
    eval_split: float = 0.0
    max_tokens: int | None = None
    on_overflow: Overflow = "split"
    weighting: Weighting = "token"
    on_bad_line: Literal["error", "skip"] = "error"
    backend: str = "auto"
    from_config: bool = False
    dtype: str = "auto"
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: Sequence[str] = field(default=("all-linear",))
    resume: bool = False


def train(config: TrainConfig, training: TrainingArguments) -> None:
    """Run the training that `config` and `training` describe, and save the model.

    Writes to `config.output` the model (safetensors), its tokenizer, checkpoints, `loss.png`, and
    `trainer_state.json` with the loss log; nothing before data and model have been accepted.

    Raises:
        FlexmaskError: an input that cannot be used; the message says where and what to do.
    """
    import transformers

    check_output(config)
    check_training_arguments(training)
    tokenizer = load_tokenizer(config)
    collator = TreeCollator(
        tokenizer,
        max_tokens=config.max_tokens,
        on_overflow=config.on_overflow,
        weighting=config.weighting,
    )
    train_set, eval_set = load_datasets(config, collator, training)
    transformers.set_seed(training.seed)
    model = load_model(config)

    from flexmask.model import patch
    from flexmask.trainer import TreeTrainer

    if config.use_peft:
        model = add_lora(model, config, bool(training.gradient_checkpointing))
    patch(model, backend=config.backend)
    trainer = TreeTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=config.resume or None)
    if eval_set is not None:
        trainer.log(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        draw_training(trainer.state.log_history, Path(config.output) / "loss.png")


def check_output(config: TrainConfig) -> None:
    """Raise DataError unless the output folder is free, or holds a run that is to be resumed."""
    from transformers.trainer_utils import get_last_checkpoint

    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; name a folder for --output")
    held = output.is_dir() and any(output.iterdir())
    if config.resume and (not held or get_last_checkpoint(str(output)) is None):
        raise DataError(f"{output}: holds no checkpoint to resume; leave out --resume")
    if held and not config.resume:
        raise DataError(f"{output}: holds another run; use --resume or another --output")


def check_training_arguments(training: TrainingArguments) -> None:
    """Raise UnsupportedModelError for Trainer options that packed rows cannot honour exactly."""
    if training.label_smoothing_factor:
        raise UnsupportedModelError(
            "--label_smoothing_factor must be 0, got "
            f"{training.label_smoothing_factor}; the Trainer would shift the labels a second time"
        )


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template that was asked for."""
    from transformers import AutoTokenizer

    source = config.tokenizer or config.model
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer")
    if config.chat_template is not None:
        path = Path(config.chat_template)
        if not path.is_file():
            raise DataError(f"{path}: no such file; --chat_template names a Jinja file")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def load_model(config: TrainConfig) -> PreTrainedModel:
    """The model to train, with weights from disk or, with `from_config`, drawn at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from flexmask.random_model import random_model

    if config.from_config:
        settings = load_pretrained(AutoConfig.from_pretrained, config.model, "model config")
        return random_model(settings)
    return load_pretrained(
        AutoModelForCausalLM.from_pretrained, config.model, "model", dtype=config.dtype
    )


def load_pretrained(load: Callable[..., Any], source: str, what: str, **settings: Any) -> Any:
    """What `load(source)` gives, or a DataError of one line that names `source`."""
    if source.startswith(("/", ".", "~")) and not Path(source).exists():
        raise DataError(f"{source}: no such folder; name a {what}'s folder or hub id")
    try:
        return load(source, **settings)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "unknown reason")
        raise DataError(f"{source}: cannot be loaded as a {what}: {reason.strip()}") from error


def load_datasets(
    config: TrainConfig, collator: TreeCollator, training: TrainingArguments
) -> tuple[TreeDataset | PreparedDataset, TreeDataset | PreparedDataset | None]:
    """The training set and, where asked for, the evaluation set; says what each holds."""
    train_set = _load(config.data, config, collator, training)
    if config.eval_data is not None:
        return train_set, _load(config.eval_data, config, collator, training)
    if not config.eval_split:
        return train_set, None
    if not 0 < config.eval_split < 1:
        raise DataError(f"--eval_split must be in [0, 1), got {config.eval_split}")
    held_out, kept = train_set.split(config.eval_split, training.data_seed or training.seed)
    return kept, held_out


def _load(
    path: str, config: TrainConfig, collator: TreeCollator, training: TrainingArguments
) -> TreeDataset | PreparedDataset:
    from tqdm import tqdm

    is_main = training.process_index == 0

    def progress(items: Iterable[Any]) -> Iterable[Any]:
        return tqdm(items, desc=f"reading {path}", unit=" conversations", disable=not is_main)

    dataset: TreeDataset | PreparedDataset
    if is_prepared(path):
        dataset = open_prepared(path, collator.tokenizer, weighting=config.weighting)
        dataset = dataset.fit(config.max_tokens, config.on_overflow)
    else:
        dataset = load_trees(path, collator, on_bad_line=config.on_bad_line, progress=progress)
    if is_main:
        print(f"{path}: {dataset.summary()}", file=sys.stderr)
        for bad in dataset.bad_lines:
            print(f"  skipped line {bad.line}: {bad.reason}", file=sys.stderr)
        for where, key in dataset.dropped:
            print(f"  dropped {where}, message {key}: longer than max_tokens", file=sys.stderr)
    return dataset


def add_lora(model: PreTrainedModel, config: TrainConfig, checkpointing: bool) -> Any:
    """The model with trainable LoRA adapters around frozen weights."""
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        model.enable_input_require_grads()
    targets = list(config.lora_target_modules)
    return get_peft_model(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        ),
    )


def draw_training(log: list[dict[str, float]], path: Path) -> None:
    """Write the loss curves of a Trainer's log as PNG."""
    from flexmask.figures import draw_losses

    curves = {}
    for name in ("loss", "eval_loss"):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            steps, losses = zip(*points, strict=True)
            curves["training" if name == "loss" else "evaluation"] = (steps, losses)
    draw_losses(curves, path)
