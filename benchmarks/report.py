"""docs/benchmarks.md and its plots, from the JSON files of the cases."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import CASES, load_case
from benchmarks.record import Record, read_records
from benchmarks.tables import (
    Columns,
    describe_checks,
    describe_settings,
    table,
    targets_table,
)
from flexmask.files import atomic_write

_HEAD = """\
# Benchmarks

<!-- Written by `python -m benchmarks report` from benchmarks/results/*.json. -->

Each case checks its results before it measures, and reports nothing if one is wrong. What is
compared runs in alternation on the same machine (A B C A B C ...). Figures are the median of the
rounds, with the lowest and the highest in brackets; ratios are taken round by round. Measure them
again with `python -m benchmarks all --record` (or `make bench`). `python -m benchmarks CASE`
measures a single case and prints it, with `--record` in place of what stands here; `--quick` tries
it out on tiny shapes.
"""


def write_report(results: Path, docs: Path) -> Path:
    """Write `benchmarks.md` and the plots it shows to the folder `docs`; returns the page's path.

    Raises:
        FileNotFoundError: `results` holds no JSON file of a case.
    """
    records = read_records(results, [*CASES])
    if not records:
        raise FileNotFoundError(
            f"{results}: holds no results; run `python -m benchmarks all --record` first"
        )
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD, *_summary(records)]
    for record in records:
        module = load_case(record["case"])
        parts += [f"## {module.TITLE}", module.ABOUT, _circumstances(record)]
        if hasattr(module, "draw"):
            name = f"benchmark-{record['case']}-{record['environment']['device']}.png"
            parts.append(f"![{module.draw(record, images / name)}](images/{name})")
        for shown in module.tables(record):
            parts += [f"{shown.heading}:", str(shown)]
    path = docs / "benchmarks.md"
    with atomic_write(path) as partial:
        partial.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def _summary(records: list[Record]) -> list[str]:
    """The targets of all cases, and where each was measured."""
    targets = [target for record in records for target in record["targets"]]
    machines = [{"case": record["case"]} | record["environment"] for record in records]
    columns: Columns = {
        "case": lambda row: row["case"],
        "processor": lambda row: str(row.get("gpu", row["cpu"])),
        "threads": lambda row: f"{row['num_threads']} of {row['num_cores']} cores",
        "torch": lambda row: row["versions"]["torch"],
        "transformers": lambda row: row["versions"]["transformers"],
        "date": lambda row: row["date"][:10],
        "load before": lambda row: f"{row['load_at_start']:.2f}",
    }
    parts = ["## Measured on", str(table("Machines", machines, columns))]
    if targets:
        parts = ["## What is to be reached", str(targets_table(targets)), *parts]
    return parts


def _circumstances(record: Record) -> str:
    """How the case was run, and its checks, as one paragraph."""
    settings = describe_settings(record["settings"])
    return f"`{record['command']}`: {settings}. {describe_checks(record['checks'])}"
