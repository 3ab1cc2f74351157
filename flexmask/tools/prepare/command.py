"""`flexmask prepare`: conversations rendered once, into a folder that training reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flexmask.errors import pluralize
from flexmask.files import check_folder
from flexmask.tools.options import TEMPLATE, add_number, add_options

USAGE = "prepare DATA... --tokenizer PATH_OR_ID --output DIR"
HELP = "render conversations once, into a folder that `flexmask train` reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_options(parser, "data", "split")
    add_options(parser, "tokenizer", required=True, help="folder or hub id")
    add_options(parser, "output", help="a new folder, or one to go on with")
    add_options(parser, *TEMPLATE, "weighting", "on_bad_line")
    parser.add_argument(
        "--output_format",
        choices=("trees", "samples"),
        default="trees",
        help="trees for flexmask, or samples, rows for other trainers; default: trees",
    )
    add_number(parser, "--num_proc", 1, "processes")
    add_number(parser, "--shard_lines", 1000, "of a shard")


def run(options: argparse.Namespace) -> int:
    """Prepare the data and say what the folder holds; returns the exit code."""
    check_folder(options.output, "--output")
    from tqdm import tqdm

    from flexmask.data.prepare import prepare
    from flexmask.data.prepared import LEFT_OUT
    from flexmask.data.tokenize import why_whole
    from flexmask.data.trees import summarize
    from flexmask.data.unused import describe_unused
    from flexmask.training.options import load_renderer

    renderer = load_renderer(options)
    tqdm.monitor_interval = 0  # no thread of tqdm's when processes are forked
    with tqdm(desc=f"preparing {options.output}", unit=" conversations") as bar:
        manifest = prepare(
            options.data,
            options.output,
            renderer.tokenizer,
            split=options.split,
            on_bad_line=options.on_bad_line,
            num_proc=options.num_proc,
            shard_lines=options.shard_lines,
            output_format=options.output_format,
            progress=bar.update,
            **renderer.settings,
        )
    shards = pluralize(len(manifest["shards"]), "shard")
    print(f"{options.output}: {summarize(manifest)}, in {shards}")
    print(f"thinking of earlier turns: {manifest['thinking']}")
    if options.output_format == "samples":
        print(f"one sample a line in {Path(options.output) / 'shard-*.jsonl'}")
    if manifest["unused_keys"]:
        print(describe_unused(manifest["unused_keys"]))
    if manifest["bad_lines"]:
        print(f"bad lines are listed in {Path(options.output) / LEFT_OUT}")
    reason = why_whole(renderer.tokenizer)
    if reason is not None:
        print(f"slow: every prompt was tokenised whole, since {reason}", file=sys.stderr)
    return 0
