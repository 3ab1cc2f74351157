"""A training run from files: conversations in, a fine-tuned model out, on the HF Trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexmask.backends.choice import choose_backend
from flexmask.collator import TreeCollator
from flexmask.dataset import TreeDataset, load_trees
from flexmask.errors import DataError, FlexmaskError, UnsupportedModelError
from flexmask.loading import load_pretrained, load_tokenizer, load_weights, random_model
from flexmask.prepared import PreparedDataset, is_prepared, open_prepared
from flexmask.rows.fitting import FittedTrees
from flexmask.rows.sampler import TreeBatchSampler
from flexmask.splitting import Overflow
from flexmask.weighting import Weighting
from flexmask.whole_file import whole_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, TrainingArguments

Trees = TreeDataset | PreparedDataset


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
        max_tokens: budget of a packed row, or None for one row per batch. Larger conversations are
            cut up front, and count as so many.
        rows_per_batch: each process's batch is that many rows of at most `max_tokens` tokens, from
            the whole data; None: `per_device_train_batch_size` conversations.
        on_overflow, weighting, on_bad_line: as in `TreeCollator` and `load_trees`.
        backend: attention backend, as in `patch`.
        from_config: draw the weights at random from the model's config instead of loading them.
        dtype: data type the model is loaded in: "auto", "float32", "bfloat16" or "float16".
        use_peft, lora_r, lora_alpha, lora_dropout, lora_target_modules: train LoRA adapters only.
        resume: go on from the last checkpoint in `output`; where there is none yet, begin.
    """

    model: str
    data: str
    output: str
    tokenizer: str | None = None
    chat_template: str | None = None
    eval_data: str | None = None
    eval_split: float = 0.0
    max_tokens: int | None = None
    rows_per_batch: int | None = None
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

    checkpoint = check_output(config)
    check_training_arguments(training, config)
    choose_backend(training.device, config.backend)
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.chat_template)
    collator = TreeCollator(
        tokenizer,
        max_tokens=config.max_tokens,
        on_overflow=config.on_overflow,
        weighting=config.weighting,
    )
    train_set, eval_set = load_datasets(config, collator, training)
    if training.process_index == 0 and collator.rendered_plainly.conversations:
        print(collator.rendered_plainly, file=sys.stderr)
    transformers.set_seed(training.seed)
    model = load_model(config)
    check_token_ids(model, tokenizer, [train_set] if eval_set is None else [train_set, eval_set])
    sampler = make_batch_sampler(config, training, train_set, model)

    from flexmask.checkpoints import disk_errors
    from flexmask.model import patch
    from flexmask.trainer import TreeTrainer

    if config.use_peft:
        model = add_lora(model, config, bool(training.gradient_checkpointing))
    patch(model, backend=config.backend)
    freeze_unreached(model, training)
    try:
        trainer = TreeTrainer(
            model=model,
            args=training,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=collator,
            processing_class=tokenizer,
            batch_sampler=sampler,
        )
    except FlexmaskError:
        raise
    except ValueError as error:  # options that the Trainer looks at together
        raise DataError(f"option of the Trainer: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise DataError(f"{config.output}: cannot be written: {error.strerror}") from None
    if config.resume and checkpoint is None and trainer.is_world_process_zero():
        print(f"{config.output}: holds no checkpoint yet, begins at step 0", file=sys.stderr)
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_set is not None:
        trainer.log(trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(config.output)
        with disk_errors(output):
            with whole_file(output / "trainer_state.json") as partial:
                trainer.state.save_to_json(str(partial))
            draw_training(trainer.state.log_history, output / "loss.png")


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


def load_model(config: TrainConfig) -> PreTrainedModel:
    """The model to train, with weights from disk or, with `from_config`, drawn at random."""
    from transformers import AutoConfig

    if config.from_config:
        settings = load_pretrained(AutoConfig.from_pretrained, config.model, "model config")
        return random_model(settings)
    return load_weights(config.model, config.dtype)


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


def load_datasets(
    config: TrainConfig, collator: TreeCollator, training: TrainingArguments
) -> tuple[Trees | FittedTrees, Trees | FittedTrees | None]:
    """The training set and, where asked for, the evaluation set; says what each holds.

    With a budget, all of their trees meet it.
    """
    train_set = _load(config.data, config, collator, training)
    eval_set = None
    if config.eval_data is not None:
        eval_set = _load(config.eval_data, config, collator, training)
    elif config.eval_split:
        eval_set, train_set = train_set.split(config.eval_split, _data_seed(training))
    return (
        _fit(train_set, "training", config, training),
        eval_set and _fit(eval_set, "evaluation", config, training),
    )


def make_batch_sampler(
    config: TrainConfig, training: TrainingArguments, train_set: Any, model: PreTrainedModel
) -> TreeBatchSampler | None:
    """The sampler that fills rows by the model's cost, or None for batches of conversations."""
    if config.rows_per_batch is None or config.max_tokens is None:
        return None
    from flexmask.plan.cost import CostModel

    sampler = TreeBatchSampler(
        train_set,
        max_tokens=config.max_tokens,
        rows_per_batch=config.rows_per_batch,
        num_processes=training.world_size,
        pairs_per_token=CostModel.of(model).pairs_per_token,
        seed=_data_seed(training),
    )
    if training.process_index == 0:
        print(f"batches: {sampler.plan()}", file=sys.stderr)
    return sampler


def _data_seed(training: TrainingArguments) -> int:
    return training.seed if training.data_seed is None else training.data_seed


def _fit(
    dataset: Trees, name: str, config: TrainConfig, training: TrainingArguments
) -> Trees | FittedTrees:
    """The dataset with nothing larger than the budget; says what was cut and what was dropped."""
    if config.max_tokens is None:
        return dataset
    fitted = FittedTrees(dataset, config.max_tokens, on_overflow=config.on_overflow)
    if training.process_index == 0 and fitted.split.trees:
        print(f"{name}, over {config.max_tokens:,} tokens: {fitted.split}", file=sys.stderr)
        for where, key in fitted.dropped:
            print(f"  dropped {where}, message {key}: longer than max_tokens", file=sys.stderr)
    return fitted


def _load(
    path: str, config: TrainConfig, collator: TreeCollator, training: TrainingArguments
) -> Trees:
    from tqdm import tqdm

    is_main = training.process_index == 0

    def progress(items: Iterable[Any]) -> Iterable[Any]:
        return tqdm(items, desc=f"reading {path}", unit=" conversations", disable=not is_main)

    dataset: Trees
    if is_prepared(path):
        dataset = open_prepared(path, collator.tokenizer, weighting=config.weighting)
    else:
        dataset = load_trees(path, collator, on_bad_line=config.on_bad_line, progress=progress)
    if is_main:
        print(f"{path}: {dataset.summary()}", file=sys.stderr)
        for bad in dataset.bad_lines:
            print(f"  skipped line {bad.line}: {bad.reason}", file=sys.stderr)
    return dataset


def add_lora(model: PreTrainedModel, config: TrainConfig, checkpointing: bool) -> Any:
    """The model with trainable LoRA adapters around frozen weights.

    Raises:
        DataError: peft refuses a rank or a name of modules.
    """
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        model.enable_input_require_grads()
    targets = list(config.lora_target_modules)
    try:
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
    except ValueError as error:  # a rank below 1, or modules that the model does not have
        raise DataError(f"--lora options: {str(error).splitlines()[0]}") from error


def freeze_unreached(model: nn.Module, training: TrainingArguments) -> None:
    """Train what text reaches of a patched model for images too, and say so."""
    from flexmask.model.structure import find_model, unreached_parameters

    unreached = [w for w in unreached_parameters(find_model(model)) if w.requires_grad]
    for weight in unreached:
        weight.requires_grad_(False)
    if unreached and training.process_index == 0:
        count = sum(weight.numel() for weight in unreached)
        print(f"frozen: {count:,} parameters that text does not reach", file=sys.stderr)


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
