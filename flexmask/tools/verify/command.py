"""`flexmask verify`: prove on one's own model, data and backend that one pass equals N."""

from __future__ import annotations

import argparse
import os

from flexmask.tools.options import TEMPLATE, add_json, add_number, add_options, print_report

USAGE = "verify DATA... --model PATH_OR_ID"
HELP = "prove on your model, data and backend that the single pass equals N-pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.description = "Exit code 0: proved; 1: not, the report says why; 2: unusable input."
    add_options(parser, "data", "split", "model", "tokenizer", *TEMPLATE)
    add_options(parser, "on_bad_line", "backend", "kernel_options", "from_config", "dtype")
    add_options(
        parser,
        "sequence_parallel_size",
        help="of the N processes that torchrun has started, each takes a part of every row",
    )
    add_number(parser, "--conversations", 3, "check the first N")
    add_number(parser, "--max_verify_tokens", 4096, "and of these the first turns, N tokens in all")
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="such as cpu or cuda:0; default: cuda if there is one")
    add("--seed", type=int, default=0, help="of random weights")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Verify, print the report and write what was asked for; returns the exit code."""
    from flexmask.tools.verify.ranks import joined
    from flexmask.tools.verify.run import find_device, verify

    device = find_device(options.device)
    with joined(options.sequence_parallel_size, device.type) as group:
        report = verify(options, device, group)
        if os.environ.get("RANK", "0") == "0":
            print_report(options, report.to_json(), str(report))
    return 0 if report.is_proved else 1
