"""`flexmask demo`: single-pass and N-pass side by side."""

from __future__ import annotations

import argparse


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its options."""
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


def run_demo(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit code.

    Raises:
        FlexmaskError: an input that cannot be used.
    """
    from flexmask.tools.demo.run import train_both_ways

    train_both_ways(
        output=options.output,
        data=options.data,
        num_steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    return 0
