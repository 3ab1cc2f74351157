"""`flexmask show`: one conversation as a packed row, in the terminal and as a picture."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from flexmask.errors import DataError
from flexmask.tools.options import TEMPLATE, add_number, add_options, add_picture

USAGE = "show [DATA...]"
HELP = "print and draw the packed row of one conversation"

_PIPE_COLUMNS = 120  # where the output is not a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_options(parser, "data", nargs="*", help="default: the tutoring conversations that ship")
    add_options(parser, "split")
    add_options(parser, "tokenizer", help="default, without DATA: the one that ships")
    add_options(parser, *TEMPLATE, "max_tokens")
    add_number(parser, "--index", 0, "which one, from 0", lowest=0)
    add_picture(parser, "--output", "draw the row as PNG or SVG, by the ending of FILE")
    parser.add_argument(
        "--compare", choices=("paper",), help="the paper's order of the same tokens beside it"
    )


def run(options: argparse.Namespace) -> int:
    """Print the conversation, and draw it if asked to; returns the exit code."""
    from flexmask.tools.show.run import show

    if options.data and options.tokenizer is None:
        raise DataError(
            f"{', '.join(options.data)}: needs the tokenizer that it is to be rendered with; "
            "name one with --tokenizer"
        )
    in_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size((_PIPE_COLUMNS, 24)).columns
    _print(show(options, width=width, in_color=in_color))
    if options.output is not None:
        _print(f"\nwritten: {options.output}")
    return 0


def _print(text: str) -> None:
    """Print `text`, with ? for what the terminal's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
