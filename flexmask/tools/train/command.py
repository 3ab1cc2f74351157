"""`flexmask train`: a training run from files of conversations."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from flexmask.errors import FlexmaskError, need_packages, one_line
from flexmask.files import only_run
from flexmask.tools.inputs import check_inputs
from flexmask.tools.options import OPTIONS, add_options, meant_option
from flexmask.tools.run_file import option_actions, text_or_json, to_yaml, with_run_file
from flexmask.training.checks import check_config, check_output
from flexmask.training.options import TrainConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

USAGE = "train DATA... --model PATH_OR_ID --output DIR"
HELP = "fine-tune a model on conversations"

_EPILOG = """\
DATA is also one folder that `flexmask prepare` made, or a YAML file of options: run.yaml.

every option of transformers.TrainingArguments works too, under its own name, such as
  --learning_rate 1e-5 --num_train_epochs 2 --per_device_train_batch_size 8
  --gradient_accumulation_steps 4 --gradient_checkpointing --bf16 --logging_steps 10
--per_device_train_batch_size counts conversations; with --max_tokens, batches are rows instead.

on several GPUs:
  torchrun --nproc-per-node 8 -m flexmask train DATA... --model PATH_OR_ID --output DIR
without a GPU, or with --use_cpu, on the CPU: --dtype float32, and no --bf16.
"""
_PARSER: dict[str, Any] = {
    "prog": "flexmask train",
    "usage": f"flexmask {USAGE} [options]",
    "allow_abbrev": False,
}
_RANKS = (
    "RANK",
    "PMI_RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
)  # as accelerate reads them
_OTHER_NAMES = {"output_dir": "output", "resume_from_checkpoint": "resume"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the help lists; `run` parses it together with the Trainer's options."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser, *OPTIONS)


def run(words: Sequence[str]) -> int:
    """Train as the words of a command line say; returns the exit code."""
    need_packages("flexmask train", "accelerate", "matplotlib")
    early = _check_early(words)
    with only_run(Path(early.output)) if _is_main() else nullcontext():
        check_output(early)
        config, training, resolved = _parse(words)
        from flexmask.training.run import train

        train(config, training, resolved)
    return 0


def _is_main() -> bool:
    """Whether this is the first of the processes that were started together."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def _check_early(words: Sequence[str]) -> TrainConfig:
    """Our options; refused is what can be without the Trainer's, which transformers has to name.

    All words behind one of these count as its values here, so DATA may be empty.
    """
    parser = argparse.ArgumentParser(**_PARSER)
    add_options(parser, "data", nargs="*")
    add_options(parser, *OPTIONS[1:])
    words, _ = with_run_file(words, parser)
    named = {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}
    for name in sorted(named - parser._option_string_actions.keys()):
        parser.add_argument(name, nargs="*")
    options, _ = parser.parse_known_args(words)
    config = TrainConfig(**_fields_of(TrainConfig, options))
    check_config(config)
    check_inputs(options, prepared=True)
    return config


def _parse(words: Sequence[str]) -> tuple[TrainConfig, TrainingArguments, str]:
    """Our options and the Trainer's, with what packed rows require of these; their run file."""
    import torch
    from transformers import TrainingArguments

    from flexmask.model.load import slow_on_cpu

    parser = full_parser()
    batch_size = parser.get_default("per_device_train_batch_size")
    parser.set_defaults(
        **dict.fromkeys(_OTHER_NAMES),
        per_device_train_batch_size=None,
        report_to="none",
        logging_steps=10,
        logging_first_step=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=None,
    )
    words, file = with_run_file(words, parser)
    if file is not None:
        file.check_keys(parser)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise FlexmaskError(_unknown(unknown, vars(options)))
    for theirs, ours in _OTHER_NAMES.items():
        if getattr(options, theirs) is not None:
            raise FlexmaskError(f"--{theirs} is --{ours} here, see `flexmask train --help`")
    options.output_dir = options.output
    if options.per_device_train_batch_size is None:
        if options.rows_per_batch is None and options.max_tokens is not None:
            options.rows_per_batch = 1
        options.per_device_train_batch_size = options.rows_per_batch or batch_size
    elif options.rows_per_batch is not None:
        raise FlexmaskError(
            "--rows_per_batch and --per_device_train_batch_size (conversations) both say what a "
            "batch is; leave out one"
        )
    if options.use_cpu is None:
        options.use_cpu = not torch.accelerator.is_available()
        if options.use_cpu and options.bf16:
            raise FlexmaskError(
                f"--bf16 without a GPU: {slow_on_cpu(torch.bfloat16)}; give --dtype float32 "
                "without --bf16, or --use_cpu to have it all the same"
            )
    config = TrainConfig(**_fields_of(TrainConfig, options))
    try:
        training = TrainingArguments(**_fields_of(TrainingArguments, options))
    except (ValueError, ImportError) as error:
        raise FlexmaskError(f"option of the Trainer: {one_line(error)}") from error
    training.prediction_loss_only = True
    names = dict.fromkeys(OPTIONS + tuple(option_actions(parser)))
    kept = {name: getattr(options, name) for name in names if name not in _OTHER_NAMES}
    if options.rows_per_batch is not None:
        del kept["per_device_train_batch_size"]  # which follows from it
    return config, training, to_yaml(kept)


def full_parser() -> argparse.ArgumentParser:
    """The parser of our options and the Trainer's, some of which take objects and lists in JSON."""
    from transformers import HfArgumentParser, TrainingArguments

    kind: Any = TrainingArguments
    parser = HfArgumentParser(kind, **_PARSER)
    types = get_type_hints(kind)
    for name, action in option_actions(parser).items():
        kinds = {get_origin(one) or one for one in get_args(types[name])}
        if kinds & {dict, list} and action.nargs is None:
            action.type = text_or_json
    add_options(parser, *OPTIONS)
    return parser


def _fields_of(kind: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return {
        field.name: getattr(options, field.name) for field in dataclasses.fields(kind) if field.init
    }


def _unknown(words: Sequence[str], known: dict[str, Any]) -> str:
    """What is said of words that are neither options nor their values."""
    name = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if name is None:
        return f"{words[0]}: stands apart from the other DATA; give all of them first"
    guess = meant_option(name.lstrip("-"), known, "--")
    return (
        f"unknown option {name}{guess}; options are those of `flexmask train --help` and of "
        "transformers.TrainingArguments"
    )
