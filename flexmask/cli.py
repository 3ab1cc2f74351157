"""The command line: `flexmask COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from flexmask import __version__
from flexmask.commands.plan import add_plan, run_plan
from flexmask.commands.show import add_show, run_show
from flexmask.commands.verify import add_verify, run_verify
from flexmask.errors import FlexmaskError

if TYPE_CHECKING:
    from transformers import TrainingArguments

_TRAIN_EPILOG = """\
every option of transformers.TrainingArguments works too, under its own name, such as
  --learning_rate 1e-5 --num_train_epochs 2 --per_device_train_batch_size 8
  --gradient_accumulation_steps 4 --gradient_checkpointing --bf16 --logging_steps 10
--per_device_train_batch_size counts conversations.

on several GPUs:
  torchrun --nproc-per-node 8 -m flexmask train --model ... --data ... --output ...
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The codes: 0 done, 1 not proved, 2 unusable input (one line says why), 130 stopped.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if options.command == "train":
            _train(options, others)
        elif options.command == "plan":
            sys.exit(run_plan(options))
        elif options.command == "verify":
            sys.exit(run_verify(options))
        elif options.command == "show":
            sys.exit(run_show(options))
        else:
            _demo(options)
    except FlexmaskError as error:
        print(f"flexmask: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("flexmask: stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexmask",
        description="Fine-tune reasoning models on multi-turn conversations in one exact pass.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flexmask {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    add_plan(commands)
    add_verify(commands)
    add_show(commands)
    _add_demo(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a model on a file of conversations",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = train.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="the model to start from")
    add("--data", required=True, metavar="FILE", help="conversations, one JSON object a line")
    add("--output", required=True, metavar="DIR", help="a new folder for the trained model")
    add("--tokenizer", metavar="PATH_OR_ID", help="default: the model's own")
    add("--chat_template", metavar="FILE", help="a Jinja file; default: the tokenizer's own")
    add("--eval_data", metavar="FILE", help="conversations to evaluate on")
    add("--eval_split", type=float, default=0.0, metavar="SHARE", help="hold out this share")
    add("--max_tokens", type=int, metavar="N", help="budget of a packed row; default: no limit")
    add("--on_overflow", choices=("split", "drop", "error"), default="split")
    add("--weighting", choices=("token", "turn", "conversation"), default="token")
    add("--on-bad-line", "--on_bad_line", choices=("error", "skip"), default="error")
    add("--backend", choices=("auto", "reference", "cpu", "flex", "triton"), default="auto")
    add("--from_config", action="store_true", help="random weights from the model's config")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--use_peft", action="store_true", help="train LoRA adapters only")
    add("--lora_r", type=int, default=16)
    add("--lora_alpha", type=int, default=32)
    add("--lora_dropout", type=float, default=0.0)
    add("--lora_target_modules", nargs="+", default=["all-linear"])
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train single-pass and N-pass side by side and show that they coincide",
        allow_abbrev=False,
    )
    add = demo.add_argument
    add("--output", default="demo-output", metavar="DIR", help="default: demo-output")
    add("--data", metavar="FILE", help="default: the tutoring conversations that ship")
    add("--steps", type=int, default=40, help="optimizer steps; default: 40")
    add("--batch_size", type=int, default=4, help="conversations a step; default: 4")
    add("--seed", type=int, default=0)


def _train(options: argparse.Namespace, others: Sequence[str]) -> None:
    from flexmask.train import TrainConfig, train

    settings = {key: value for key, value in vars(options).items() if key != "command"}
    config = TrainConfig(**settings)
    train(config, _training_arguments(config.output, others))


def _training_arguments(output: str, others: Sequence[str]) -> TrainingArguments:
    """The Trainer's own options, parsed by transformers, with what packed rows require."""
    from transformers import HfArgumentParser, TrainingArguments

    arguments: Any = TrainingArguments
    parser = HfArgumentParser(arguments, prog="flexmask train", allow_abbrev=False)
    parser.set_defaults(
        output_dir=output,
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    try:
        (training,) = parser.parse_args_into_dataclasses(args=list(others))
    except (ValueError, ImportError) as error:
        raise FlexmaskError(f"option of the Trainer: {str(error).splitlines()[0]}") from error
    training.prediction_loss_only = True
    return training


def _demo(options: argparse.Namespace) -> None:
    from flexmask.demo.run import run_demo

    run_demo(
        output=options.output,
        data=options.data,
        num_steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
