"""One training run: what is refused first, then data, model, training, and what is left of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flexmask.errors import DataError, FlexmaskError, one_line
from flexmask.files import atomic_write, write_json
from flexmask.model.load import load_model, slow_on_cpu
from flexmask.training.checks import (
    check_backend,
    check_model,
    check_output,
    check_token_ids,
    check_training_arguments,
)
from flexmask.training.data import (
    load_datasets,
    make_batch_sampler,
    make_collator,
    settle_renderer,
)
from flexmask.training.options import TrainConfig, add_lora, load_renderer
from flexmask.training.sequence_parallel import make_group
from flexmask.training.stops import add_stops

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerState, TrainingArguments

    from flexmask.data.renderer import Renderer


def train(config: TrainConfig, training: TrainingArguments, resolved: str) -> None:
    """Run the training that `config` and `training` describe, and save the model.

    Writes to `config.output` the model (safetensors), its tokenizer, checkpoints, `loss.png`,
    `trainer_state.json` with the loss log, `rendering.json` with the settings of the chat template
    that serving needs too, and `resolved.yaml`; nothing before data and model have been accepted.

    Args:
        config: our options.
        training: the Trainer's.
        resolved: the run file of both, which is kept with the model.

    Raises:
        FlexmaskError: an input that cannot be used; the message says where and what to do.
    """
    import transformers

    checkpoint = check_output(config)
    check_training_arguments(training, config)
    check_backend(training, config)
    check_model(training, config)
    renderer = settle_renderer(load_renderer(config, config.model), config, checkpoint)
    tokenizer = renderer.tokenizer
    collator = make_collator(renderer, config, training)
    train_set, eval_set = load_datasets(config, collator, training)
    transformers.set_seed(training.seed)
    model = load_model(
        config.model,
        config.dtype,
        from_config=config.from_config,
        load_in_4bit=config.load_in_4bit,
    )
    check_token_ids(model, tokenizer, [train_set] if eval_set is None else [train_set, eval_set])
    sampler = make_batch_sampler(config, training, train_set, model)
    has_new_stops = add_stops(model, tokenizer, train_set, training)

    from flexmask.model import patch
    from flexmask.training.checkpoints import checkpoint_errors
    from flexmask.training.merge import save_merged
    from flexmask.training.trainer import LogEnds, TreeTrainer

    if config.use_peft:
        if config.load_in_4bit:
            from peft import prepare_model_for_kbit_training

            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if training.gradient_checkpointing:
            model.enable_input_require_grads()
        model = add_lora(model, config)
    patch(
        model,
        backend=config.backend,
        kernel_options=config.kernel_options,
        sequence_group=make_group(training, config.sequence_parallel_size),
    )
    freeze_unreached(model, training)
    if training.process_index == 0:
        tell_rounding(model)
    try:
        with checkpoint_errors(Path(config.output)):
            trainer = TreeTrainer(
                model=model,
                args=training,
                train_dataset=train_set,
                eval_dataset=eval_set,
                data_collator=collator,
                processing_class=tokenizer,
                batch_sampler=sampler,
                log_token_metrics=config.log_token_metrics,
                callbacks=[LogEnds()],
            )
    except FlexmaskError:
        raise
    except ValueError as error:  # options that the Trainer looks at together
        raise DataError(f"option of the Trainer: {one_line(error)}") from error
    if config.resume and checkpoint is None and trainer.is_world_process_zero():
        print(f"{config.output}: holds no checkpoint yet, begins at step 0", file=sys.stderr)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(where_stopped(trainer.state, config.output)) from None
    is_last = not training.load_best_model_at_end and any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step
        for entry in trainer.state.log_history
    )
    if eval_set is not None and not is_last:
        trainer.evaluate()  # which logs what it finds
    try:
        trainer.save_model()
    finally:  # an upload may have failed
        if trainer.is_world_process_zero():
            with checkpoint_errors(Path(config.output)):
                leave_records(Path(config.output), trainer.state, renderer, resolved)
                if has_new_stops and config.use_peft:  # adapters are saved without
                    model.generation_config.save_pretrained(config.output)
    if trainer.is_world_process_zero():
        what = "the adapters" if config.use_peft else "the model"
        print(
            f"{config.output}: {what}, saved after step {trainer.state.global_step}",
            file=sys.stderr,
        )
    if config.merge_lora and trainer.is_world_process_zero():
        save_merged(config, training.seed, tokenizer, model.generation_config)


def leave_records(output: Path, state: TrainerState, renderer: Renderer, resolved: str) -> None:
    """Write the log of a run, its picture, its options, and how its data were rendered."""
    with atomic_write(output / "resolved.yaml") as partial:
        partial.write_text(resolved, encoding="utf-8")
    with atomic_write(output / "trainer_state.json") as partial:
        state.save_to_json(str(partial))
    about = {**renderer.settings, "thinking": renderer.thinking_text}
    write_json(about, output / "rendering.json")
    draw_training(state.log_history, output / "loss.png")


def where_stopped(state: TrainerState, output: str) -> str:
    """What is said of a run that was interrupted: its step, and how to go on."""
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(output) if Path(output).is_dir() else None
    text = f"after step {state.global_step} of {state.max_steps}; "
    if checkpoint is None:
        return text + "no checkpoint was saved yet, see --save_steps"
    return text + f"the same command with --resume goes on from {checkpoint}"


def freeze_unreached(model: nn.Module, training: TrainingArguments) -> None:
    """Train what text reaches of a patched model for images too, and say so."""
    from flexmask.model.structure import find_model, unreached_parameters

    unreached = [w for w in unreached_parameters(find_model(model)) if w.requires_grad]
    for weight in unreached:
        weight.requires_grad_(False)
    if unreached and training.process_index == 0:
        count = sum(weight.numel() for weight in unreached)
        print(f"frozen: {count:,} parameters that text does not reach", file=sys.stderr)


def tell_rounding(model: nn.Module) -> None:
    """Say so where weights are in a type that rounds small updates away, or slow on a CPU."""
    import torch

    first = next(model.parameters())
    if first.device.type == "cpu" and first.dtype.itemsize == 2:
        print(f"speed: {slow_on_cpu(first.dtype)}; give --dtype float32", file=sys.stderr)
    for dtype in {weight.dtype for weight in model.parameters() if weight.requires_grad}:
        if torch.finfo(dtype).bits < 32:
            name = str(dtype).removeprefix("torch.")
            print(
                f"rounding: weights are trained in {name}, which loses updates below about "
                f"1/{2 / torch.finfo(dtype).eps:.0f} of a weight; --dtype float32 keeps them, and "
                "with --bf16 computes in bfloat16 all the same",
                file=sys.stderr,
            )


def draw_training(log: list[dict[str, float]], path: Path) -> None:
    """Write the loss curves of a Trainer's log as PNG; say so where it holds no loss."""
    from flexmask.plots import draw_losses

    curves = {}
    for name, key in (("training", "loss"), ("evaluation", "eval_loss")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            steps, losses = zip(*points, strict=True)
            curves[name] = (steps, losses)
    if curves:
        draw_losses(curves, path)
    else:
        print(f"{path}: not drawn, no loss was logged", file=sys.stderr)
