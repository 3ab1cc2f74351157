"""`flexmask plan`: count a file of conversations before training on it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError, pluralize
from flexmask.tools.options import Commands, add_command, add_options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from flexmask.model.windows import Window
    from flexmask.tree.sample import Sample


def add_plan(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its options."""
    plan = add_command(
        commands,
        "plan DATA... --tokenizer PATH_OR_ID",
        run_plan,
        help="count tokens, cost and pitfalls of a file of conversations",
    )
    add_options(plan, "data")
    add_options(plan, "tokenizer", required=True, help="folder or hub id")
    add_options(plan, "chat_template", "chat_template_kwargs", "max_tokens", "on_bad_line")
    add_options(
        plan,
        "model",
        required=False,
        help="estimate speed-up and memory of a folder or hub id; its config is enough",
    )
    add_options(plan, "dtype")
    add = plan.add_argument
    add(
        "--measure",
        type=int,
        nargs="?",
        const=4,
        default=0,
        metavar="N",
        help="run steps on the first N conversations beside the estimate; default: 4",
    )
    add("--plot", metavar="FILE", help="draw turns and lengths, as PNG or SVG")
    add("--json", nargs="?", const="-", metavar="FILE", help="as JSON; without FILE, print it")


def run_plan(options: argparse.Namespace) -> int:
    """Make the plan, print it and write what was asked for; returns the exit code.

    Raises:
        FlexmaskError: an input that cannot be used.
    """
    _check(options)
    from flexmask.data.files import find_data_files
    from flexmask.files import write_json
    from flexmask.model.checks import check_vocabulary
    from flexmask.model.load import load_tokenizer
    from flexmask.tools.plan.survey import make_plan

    config, windows = (None, ()) if options.model is None else _load_config(options)
    kept: list[Sequence[Sample]] = []

    def keep(samples: Sequence[Sample]) -> None:
        if config is not None and len(kept) < options.measure:
            size = config.get_text_config(decoder=True).vocab_size
            check_vocabulary(size, (sample.input_ids for sample in samples))
            kept.append(samples)

    files = find_data_files(options.data)
    plan = make_plan(
        files,
        load_tokenizer(options.tokenizer, options.chat_template),
        max_tokens=options.max_tokens,
        chat_template_kwargs=options.chat_template_kwargs,
        on_bad_line=options.on_bad_line,
        windows=windows,
        progress=_progress(files),
        watch=keep,
    )
    report = plan.to_json() | {"estimate": None, "measured": None}
    from flexmask.tools.plan.report import plan_text

    texts = [plan_text(plan)]
    if config is not None:
        _add_model(options, config, plan, kept, report, texts)
    print(json.dumps(report, indent=2) if options.json == "-" else "\n\n".join(texts))
    if options.json not in (None, "-"):
        write_json(report, options.json)
    if options.plot is not None:
        from flexmask.tools.plan.figure import draw_plan

        draw_plan(plan, options.plot)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise DataError, before anything runs, for options that do not go together."""
    from flexmask.files import check_target
    from flexmask.plots import check_picture

    if options.json not in (None, "-"):
        check_target(options.json, "--json")
    if options.plot is not None:
        check_picture(options.plot, "--plot")
    if options.measure < 0:
        raise DataError(f"--measure must be at least 1, got {options.measure}")
    if options.measure and options.model is None:
        raise DataError("--measure runs steps of a model; name one with --model")


def _progress(files: Sequence[Path]) -> Any:
    """A progress bar over the lines of some files, on stderr."""
    from tqdm import tqdm

    counts = list(map(_count_lines, files))
    total = sum(filter(None, counts)) if all(counts) else None
    name = files[0] if len(files) == 1 else pluralize(len(files), "file")

    def progress(items: Iterable[Any]) -> Iterable[Any]:
        return tqdm(
            items, desc=f"reading {name}", unit=" conversations", total=total, file=sys.stderr
        )

    return progress


def _count_lines(path: Path) -> int | None:
    """How many lines a file has, None where it cannot be read: reading it will say why."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b"")) or None
    except OSError:
        return None


def _load_config(options: argparse.Namespace) -> tuple[PreTrainedConfig, tuple[Window, ...]]:
    """The config of a model and its windows and chunks.

    A model that cannot be patched is refused here, before the data is read.
    """
    import copy

    from transformers import AutoConfig

    from flexmask.model.cost import CostModel
    from flexmask.model.load import load_pretrained, meta_model

    config = load_pretrained(AutoConfig.from_pretrained, options.model, "model config")
    cost = CostModel.of(meta_model(copy.deepcopy(config), _dtype(options.dtype, config)))
    return config, cost.windows


def _add_model(
    options: argparse.Namespace,
    config: PreTrainedConfig,
    plan: Any,
    kept: list[Sequence[Sample]],
    report: dict[str, Any],
    texts: list[str],
) -> None:
    """Add the estimate for a model and, where asked for, measured steps."""
    import copy
    from dataclasses import asdict

    import torch

    from flexmask.tools.plan.estimate import estimate
    from flexmask.tools.plan.report import estimate_text, measured_text

    dtype = _dtype(options.dtype, config)
    guess = estimate(plan, copy.deepcopy(config), dtype)
    report["estimate"] = asdict(guess)
    texts.append(estimate_text(guess))
    if not options.measure:
        return
    from tqdm import tqdm

    from flexmask.tools.plan.measure import measure_steps

    measured = measure_steps(
        config,
        kept,
        dtype=dtype,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        saved_per_token=guess.saved_bytes_per_token,
        progress=lambda rounds: tqdm(rounds, desc="measuring", unit="round", file=sys.stderr),
    )
    report["measured"] = asdict(measured)
    texts.append(measured_text(measured))


def _dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    import torch

    if name != "auto":
        return getattr(torch, name)
    own = config.get_text_config(decoder=True).dtype
    return own if isinstance(own, torch.dtype) else torch.float32
