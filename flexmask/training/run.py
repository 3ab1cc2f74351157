"""One training run: what is refused first, then data, model, training, and what is left of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError, FlexmaskError, one_line
from flexmask.files import atomic_write, write_json
from flexmask.model.load import load_model
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
from flexmask.training.model import prepare_model
from flexmask.training.options import TrainConfig, load_renderer
from flexmask.training.stops import add_stops

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from flexmask.data.renderer import Renderer
    from flexmask.training.trainer import TreeTrainer


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
    from flexmask.training.merge import save_merged

    checkpoint = check_output(config)
    check_training_arguments(training, config)
    check_backend(training, config)
    check_model(training, config)
    renderer = settle_renderer(load_renderer(config, config.model), config, checkpoint)
    trainer = make_trainer(config, training, renderer)
    is_main = trainer.is_world_process_zero()
    if config.resume and checkpoint is None and is_main:
        print(f"{config.output}: holds no checkpoint yet, begins at step 0", file=sys.stderr)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(where_stopped(trainer.state, config.output)) from None
    is_last = not training.load_best_model_at_end and any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step
        for entry in trainer.state.log_history
    )
    if trainer.eval_dataset is not None and not is_last:
        trainer.evaluate()  # which logs what it finds
    try:
        trainer.save_model()
    finally:  # an upload may have failed
        if is_main:
            leave_records(trainer, renderer, resolved)
    if is_main:
        what = "the adapters" if config.use_peft else "the model"
        step = trainer.state.global_step
        print(f"{config.output}: {what}, saved after step {step}", file=sys.stderr)
    if config.merge_lora and is_main:
        model: Any = trainer.model
        save_merged(config, training.seed, renderer.tokenizer, model.generation_config)


def make_trainer(
    config: TrainConfig, training: TrainingArguments, renderer: Renderer
) -> TreeTrainer:
    """The trainer of a run, with its data and its patched model.

    Raises:
        FlexmaskError: data, model or options that cannot be used.
    """
    import transformers

    from flexmask.training.checkpoints import checkpoint_errors
    from flexmask.training.trainer import LogEnds, TreeTrainer

    collator = make_collator(renderer, config, training)
    train_set, eval_set = load_datasets(config, collator, training)
    transformers.set_seed(training.seed)
    model = load_model(
        config.model,
        config.dtype,
        from_config=config.from_config,
        load_in_4bit=config.load_in_4bit,
    )
    tokenizer = renderer.tokenizer
    check_token_ids(model, tokenizer, [train_set] if eval_set is None else [train_set, eval_set])
    sampler = make_batch_sampler(config, training, train_set, model)
    add_stops(model, tokenizer, train_set, training)
    model = prepare_model(model, config, training)
    try:
        with checkpoint_errors(Path(config.output)):
            return TreeTrainer(
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


def leave_records(trainer: TreeTrainer, renderer: Renderer, resolved: str) -> None:
    """Write the log of a run, its picture, its options, and how its data were rendered."""
    from flexmask.training.checkpoints import checkpoint_errors

    output = Path(str(trainer.args.output_dir))
    model: Any = trainer.model
    generation = model.generation_config
    with checkpoint_errors(output):
        with atomic_write(output / "resolved.yaml") as partial:
            partial.write_text(resolved, encoding="utf-8")
        with atomic_write(output / "trainer_state.json") as partial:
            trainer.state.save_to_json(str(partial))
        about = {**renderer.settings, "thinking": renderer.thinking_text}
        write_json(about, output / "rendering.json")
        draw_training(trainer.state.log_history, output / "loss.png")
        path = output / "generation_config.json"
        if generation is not None and not path.exists():  # adapters are saved without it
            write_json(generation.to_diff_dict(), path)


def where_stopped(state: TrainerState, output: str) -> str:
    """What is said of a run that was interrupted: its step, and how to go on."""
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(output) if Path(output).is_dir() else None
    text = f"after step {state.global_step} of {state.max_steps}; "
    if checkpoint is None:
        return text + "no checkpoint was saved yet, see --save_steps"
    return text + f"the same command with --resume goes on from {checkpoint}"


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
