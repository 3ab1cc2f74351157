"""`flexmask demo`: single-pass and N-pass side by side."""

from __future__ import annotations

import argparse

from flexmask.tools.options import Commands, add_command, add_options


def add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its options."""
    demo = add_command(
        commands,
        "demo [DATA...]",
        run_demo,
        help="train single-pass and N-pass side by side and show that they coincide",
    )
    add_options(demo, "data", nargs="*", help="default: the tutoring conversations that ship")
    add = demo.add_argument
    add("--output", default="demo-output", metavar="DIR", help="default: demo-output")
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
