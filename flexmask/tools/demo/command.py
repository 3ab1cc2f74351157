"""`flexmask demo`: single-pass and N-pass side by side."""

from __future__ import annotations

import argparse

from flexmask.tools.options import add_options, at_least

USAGE = "demo [DATA...]"
HELP = "train single-pass and N-pass side by side and show that they coincide"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_options(parser, "data", nargs="*", help="default: the tutoring conversations that ship")
    add = parser.add_argument
    add("--output", default="demo-output", metavar="DIR", help="default: demo-output")
    add("--steps", type=int, action=at_least(1), default=40, help="optimizer steps; default: 40")
    add(
        "--batch_size",
        type=int,
        action=at_least(1),
        default=4,
        help="conversations a step; default: 4",
    )
    add("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    from flexmask.tools.demo.run import train_both_ways

    train_both_ways(options)
    return 0
