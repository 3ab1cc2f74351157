"""`flexmask train`: a training run from a file of conversations."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexmask.errors import FlexmaskError
from flexmask.tools.template_options import add_template_options, read_template_kwargs

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from flexmask.training.options import TrainConfig

_USAGE = "flexmask train --model PATH_OR_ID --data PATH... --output DIR [OPTIONS]"

_EPILOG = """\
every option of transformers.TrainingArguments works too, under its own name, such as
  --learning_rate 1e-5 --num_train_epochs 2 --per_device_train_batch_size 8
  --gradient_accumulation_steps 4 --gradient_checkpointing --bf16 --logging_steps 10
--per_device_train_batch_size counts conversations; with --max_tokens, batches are rows instead.

on several GPUs:
  torchrun --nproc-per-node 8 -m flexmask train --model ... --data ... --output ...
"""


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its options; options of the Trainer are left to `run_train`."""
    train = commands.add_parser(
        "train",
        help="fine-tune a model on a file of conversations",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = train.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="the model to start from")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="conversations: files, folders or patterns, or one prepared folder",
    )
    add("--output", required=True, metavar="DIR", help="a new folder for the trained model")
    add("--tokenizer", metavar="PATH_OR_ID", help="default: the model's own")
    add_template_options(train)
    add("--eval_data", nargs="+", metavar="PATH", help="conversations to evaluate on, likewise")
    add("--eval_split", type=float, default=0.0, metavar="SHARE", help="hold out this share")
    add("--max_tokens", type=int, metavar="N", help="budget of a packed row; default: no limit")
    add(
        "--rows_per_batch",
        type=int,
        metavar="R",
        help="a batch is R rows of at most --max_tokens tokens, from the whole data; default "
        "with --max_tokens: 1, unless --per_device_train_batch_size counts conversations",
    )
    add(
        "--on_overflow",
        choices=("split", "drop", "error"),
        default="split",
        help="what is larger than the budget is cut (split), cut and without samples longer than "
        "it (drop), or refused; default: split",
    )
    add(
        "--weighting",
        choices=("token", "turn", "conversation"),
        default="token",
        help="what counts once in the loss; default: token",
    )
    add("--on_bad_line", choices=("error", "skip"), default="error", help="default: error")
    add(
        "--backend",
        choices=("auto", "reference", "cpu", "flex", "triton"),
        default="auto",
        help="of attention; default: flex on a GPU, else cpu",
    )
    add("--from_config", action="store_true", help="random weights from the model's config")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; default: the checkpoint's",
    )
    add("--use_peft", action="store_true", help="train LoRA adapters only")
    add("--lora_r", type=int, default=16, metavar="R", help="rank; default: 16")
    add("--lora_alpha", type=int, default=32, metavar="A", help="updates times A / R; default: 32")
    add("--lora_dropout", type=float, default=0.0, metavar="P", help="must be 0")
    add(
        "--lora_target_modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="default: all-linear",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint, or begin")


def run_train(options: argparse.Namespace, others: Sequence[str]) -> int:
    """Train; `others` are options of the Trainer. Returns the exit code.

    Raises:
        FlexmaskError: an input that cannot be used.
    """
    from flexmask.training.options import TrainConfig
    from flexmask.training.run import train

    _check_others(others)
    settings = {key: value for key, value in vars(options).items() if key != "command"}
    settings["chat_template_kwargs"] = read_template_kwargs(options.chat_template_kwargs)
    settings["rows_per_batch"] = _rows_per_batch(options, others)
    config = TrainConfig(**settings)
    train(config, _training_arguments(config, others))
    return 0


def _names(others: Sequence[str]) -> set[str]:
    """The options among the words of a command line, which `main` has --spelled_like_this."""
    return {word.partition("=")[0] for word in others if word.startswith("--")}


def _check_others(others: Sequence[str]) -> None:
    """Raise FlexmaskError for options of the Trainer that have another name here."""
    for theirs, ours in (("--output_dir", "--output"), ("--resume_from_checkpoint", "--resume")):
        if theirs in _names(others):
            raise FlexmaskError(f"{theirs} is {ours} here; use that, see `flexmask train --help`")


def _rows_per_batch(options: argparse.Namespace, others: Sequence[str]) -> int | None:
    """Rows of a batch, or None where it is `--per_device_train_batch_size` conversations."""
    if "--per_device_train_batch_size" in _names(others):
        if options.rows_per_batch is not None:
            raise FlexmaskError(
                "--rows_per_batch and --per_device_train_batch_size (conversations) both say what "
                "a batch is; leave out one"
            )
        return None
    if options.rows_per_batch is None and options.max_tokens is not None:
        return 1
    return options.rows_per_batch


def _guess(unknown: str, *known: Any) -> str:
    """The option that was meant, as a question, or nothing."""
    names = [f"--{field.name}" for options in known for field in dataclasses.fields(options)]
    meant = difflib.get_close_matches(unknown.partition("=")[0], names, n=1, cutoff=0.7)
    return f" (did you mean {meant[0]}?)" if meant else ""


def _training_arguments(config: TrainConfig, others: Sequence[str]) -> TrainingArguments:
    """The Trainer's own options, parsed by transformers, with what packed rows require."""
    from transformers import HfArgumentParser, TrainingArguments

    arguments: Any = TrainingArguments
    parser = HfArgumentParser(arguments, prog="flexmask train", usage=_USAGE, allow_abbrev=False)
    parser.set_defaults(
        output_dir=config.output,
        report_to="none",
        logging_steps=10,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    if config.rows_per_batch is not None:
        parser.set_defaults(per_device_train_batch_size=config.rows_per_batch)
    try:
        training, unknown = parser.parse_args_into_dataclasses(
            args=list(others), return_remaining_strings=True
        )
    except (ValueError, ImportError) as error:
        raise FlexmaskError(f"option of the Trainer: {' '.join(str(error).split())}") from error
    if unknown:
        raise FlexmaskError(
            f"unknown option {unknown[0]}{_guess(unknown[0], config, training)}; options are those "
            "of `flexmask train --help` and of transformers.TrainingArguments"
        )
    training.prediction_loss_only = True
    return training
