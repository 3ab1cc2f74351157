"""`flexmask plan`: count a file of conversations before training on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError
from flexmask.tools.options import (
    TEMPLATE,
    add_json,
    add_number,
    add_options,
    add_picture,
    at_least,
    print_report,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexmask.data.file_formats import DataFile
    from flexmask.data.renderer import Renderer
    from flexmask.tree.sample import Sample

USAGE = "plan DATA... --tokenizer PATH_OR_ID"
HELP = "count tokens, cost and pitfalls of a file of conversations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_options(parser, "data", "split")
    add_options(parser, "tokenizer")
    add_options(parser, *TEMPLATE, "max_tokens", "on_bad_line")
    add_options(
        parser,
        "model",
        required=False,
        help="estimate speed-up and memory of a folder or hub id; its config is enough",
    )
    add_options(parser, "dtype", "sequence_parallel_size")
    parser.add_argument(
        "--measure",
        type=int,
        action=at_least(1),
        nargs="?",
        const=4,
        default=0,
        metavar="N",
        help="run steps on the first N conversations beside the estimate; without N: 4",
    )
    add_number(parser, "--measure_seconds", 300, "stop measuring after N seconds")
    add_picture(parser, "--plot", "draw turns and lengths, as PNG or SVG")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Make the plan, print it and write what was asked for; returns the exit code."""
    if options.measure and options.model is None:
        raise DataError("--measure runs steps of a model; name one with --model")
    if options.tokenizer is None and options.model is None:
        raise DataError("plan needs a tokenizer; name one with --tokenizer, or a --model")
    if options.sequence_parallel_size > 1 and options.model is None:
        raise DataError("--sequence_parallel_size shares a model's memory; name it with --model")
    import torch
    from tqdm import tqdm

    from flexmask.data.sources import find_data_files
    from flexmask.model.checks import check_sequence_group
    from flexmask.model.cost import CostModel
    from flexmask.tools.plan.estimate import estimate
    from flexmask.tools.plan.figure import draw_plan
    from flexmask.tools.plan.measure import expected_steps, measure_steps
    from flexmask.tools.plan.report import estimate_text, measured_text, plan_text
    from flexmask.tools.plan.survey import make_plan
    from flexmask.training.options import load_renderer

    renderer = load_renderer(options, options.model)
    model = None if options.model is None else _random_model(options, "meta")
    if model is not None and options.sequence_parallel_size > 1:
        check_sequence_group(model)
    windows = (
        () if model is None else CostModel.of(model).windows
    )  # or refused, before data is read
    files = find_data_files(options.data, options.split)
    if not {*files.values()} <= {1}:
        print("weights: they are for training; all is counted once here", file=sys.stderr)
    measured_on = _first_conversations(options, files, renderer, model)
    plan = make_plan(
        files,
        renderer,
        max_tokens=options.max_tokens,
        on_bad_line=options.on_bad_line,
        windows=windows,
        progress=partial(tqdm, desc="reading", unit=" conversations"),
    )
    report: dict[str, Any] = plan.to_json() | {"estimate": None, "measured": None}
    guess = None if model is None else estimate(plan, model, options.sequence_parallel_size)
    texts = [plan_text(plan, guess)]
    if guess is not None:
        report["estimate"] = asdict(guess)
        texts.append(estimate_text(guess))
    if options.plot is not None:
        draw_plan(plan, options.plot)
    code = 0
    if measured_on and guess is not None:
        if options.json != "-":
            print("\n\n".join(texts) + "\n", flush=True)
        built = _random_model(options, "cuda" if torch.cuda.is_available() else "cpu")
        print(f"measuring: {expected_steps(built, measured_on, guess)}", file=sys.stderr)
        measured = measure_steps(
            built,
            measured_on,
            saved_per_token=guess.saved_bytes_per_token,
            limit_s=options.measure_seconds,
            progress=partial(tqdm, desc="measuring", unit="round"),
        )
        if measured is None:
            texts = [
                f"not measured: no round was done in {options.measure_seconds} s; give "
                "--measure_seconds more" + ", or --measure fewer" * (options.measure > 1)
            ]
        else:
            report["measured"] = asdict(measured)
            texts = [measured_text(measured)]
            code = 130 if measured.was_stopped else 0
    print_report(options, report, "\n\n".join(texts))
    return code


def _random_model(options: argparse.Namespace, device: str) -> PreTrainedModel:
    """The model of `--model` and `--dtype` with random weights; with none on the meta device."""
    import torch

    from flexmask.model.load import load_model

    with torch.device(device):
        return load_model(options.model, options.dtype, from_config=True)


def _first_conversations(
    options: argparse.Namespace, files: Iterable[DataFile], renderer: Renderer, model: Any
) -> list[list[Sample]]:
    """The samples of the conversations that `--measure` asks for; none without it."""
    from flexmask.data.files import BadLine, read_files
    from flexmask.model.checks import check_vocabulary
    from flexmask.model.structure import text_config

    items = read_files(
        files,
        renderer.samples,
        on_bad_line=options.on_bad_line,
        columns=renderer.data_columns,
    )
    used = (item for item in items if not isinstance(item, BadLine))
    first = list(islice(used, options.measure))
    if first:
        ids = (sample.input_ids for samples in first for sample in samples)
        check_vocabulary(text_config(model).vocab_size, ids)
    return first
