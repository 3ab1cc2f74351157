"""`flexmask demo`: single-pass and N-pass side by side."""

from __future__ import annotations

import argparse

from flexmask.tools.options import add_number, add_options

USAGE = "demo [DATA...]"
HELP = "train single-pass and N-pass side by side and show that they coincide"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_options(parser, "data", nargs="*", help="default: the tutoring conversations that ship")
    add = parser.add_argument
    add("--output", default="demo-output", metavar="DIR", help="default: demo-output")
    add_number(parser, "--steps", 40, "optimizer steps")
    add_number(parser, "--batch_size", 4, "conversations a step")
    add("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    from flexmask.tools.demo.run import train_both_ways

    train_both_ways(options)
    return 0
