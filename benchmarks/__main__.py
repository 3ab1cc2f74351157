"""The command line: `python -m benchmarks CASE [--quick | --record]`, and `report`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, ON_GPU, load_case, why_not
from benchmarks.environment import describe_environment
from benchmarks.record import CheckFailedError, Record, Row, as_record, record_path, write_record
from benchmarks.tables import describe_checks, describe_machine, describe_settings, targets_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` ask for.

    Returns:
        0; 1 where a result is wrong and nothing is reported; 2 for a report without results, or a
        case that this machine cannot run.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if getattr(options, "resume", False) and options.output is None:
        parser.error("--resume goes on with a JSON file; name its folder by --output, or --record")
    if options.case == "report":
        from benchmarks.report import write_report

        try:
            print(f"written: {write_report(options.results, options.docs).name}")
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    wrong: list[str] = []
    try:
        for case in CASES if options.case == "all" else (options.case,):
            reason = why_not(case, quick=options.quick)
            if reason is None:
                wrong += _run(case, options)
            elif options.case == "all":
                print(f"\n{case}: left out, {reason}")
            else:
                print(f"{case}: {reason}", file=sys.stderr)
                return 2
    except CheckFailedError as error:
        print(f"{case}: wrong result, nothing reported: {error}", file=sys.stderr)
        return 1
    for what in wrong:
        print(f"wrong result, without figures: {what}", file=sys.stderr)
    return 1 if wrong else 0


def _run(case: str, options: argparse.Namespace) -> list[str]:
    """Measure one case, print it, and write its JSON file, whole after each of its steps.

    Returns:
        What is wrong, where a case goes on in spite of it.
    """
    module = load_case(case)
    is_on_gpu = case in ON_GPU
    environment = describe_environment(module.device() if is_on_gpu else "cpu")
    print(f"\n# {module.TITLE}\n")
    folder = options.output
    settings: dict[str, Any] = {}
    if is_on_gpu:
        if options.limit is not None:
            settings["limit_s"] = options.limit
        if options.resume and folder is not None:
            settings["previous"] = _previous(case, folder, environment)
    found = module.measure(quick=options.quick, **settings)
    for measurement in found if is_on_gpu else [found]:
        record = as_record(
            measurement,
            case=case,
            is_quick=options.quick,
            command=_command(case, options),
            environment=environment,
        )
        path = None if folder is None else write_record(record, folder)
    print(describe_machine(environment))
    print(f"{describe_settings(record['settings'])}\n\n{describe_checks(record['checks'])}\n")
    for table in module.tables(record):
        print(f"{table.heading}\n\n{table}\n")
    if record["targets"]:
        print(f"{targets_table(record['targets'])}\n")
    if path is not None:
        print(f"written: {path.name}", flush=True)
    return record.get("wrong", [])


def _previous(case: str, folder: Path, environment: Row) -> Record | None:
    """The record in `folder` if it was made here, with the same versions."""
    path = record_path(folder, case, environment)
    if not path.exists():
        return None
    record = json.loads(path.read_text("utf-8"))
    for name in ("device", "versions"):
        if record["environment"][name] != environment[name]:
            print(f"{path.name} is of other {name}: measured anew")
            return None
    return record


def _command(case: str, options: argparse.Namespace) -> str:
    """The command that measures this case again, without the folder of this machine."""
    words = ["python", "-m", "benchmarks", case]
    words += ["--quick"] * options.quick
    words += ["--threads", str(options.threads)] if options.threads else []
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check a case, then measure and print it; CASE --help lists the options.",
    )
    commands = parser.add_subparsers(dest="case", required=True, metavar="CASE")
    for case, help_line in {**CASES, "all": "every case that this machine can run"}.items():
        command = commands.add_parser(case, help=help_line)
        command.add_argument("--output", type=Path, metavar="DIR", help="write a JSON file there")
        either = command.add_mutually_exclusive_group()
        either.add_argument("--quick", action="store_true", help="tiny shapes, to try it out")
        either.add_argument(
            "--record",
            action="store_const",
            dest="output",
            const=RESULTS,
            help="write it to benchmarks/results, in place of what docs/benchmarks.md shows",
        )
        if case in (*ON_GPU, "all"):
            command.add_argument(
                "--limit", type=float, metavar="SECONDS", help="begin nothing new after so long"
            )
            command.add_argument(
                "--resume", action="store_true", help="go on with the JSON file that is there"
            )
        command.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    report = commands.add_parser("report", help="write docs/benchmarks.md from the results")
    report.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    report.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
