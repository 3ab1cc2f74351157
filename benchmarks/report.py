"""docs/benchmarks.md and its plots, from the JSON files of the cases."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import CASES, load_case
from benchmarks.record import Record, read_records
from benchmarks.tables import Table, describe_checks, describe_settings, targets_table
from flexmask.files import atomic_write

_HEAD = """\
# Benchmarks

<!-- Written by `python -m benchmarks report` from benchmarks/results/*.json. -->

Each case checks its results before it measures, and reports nothing if one is wrong. What is
compared runs in alternation on the same machine (A B C A B C ...). Figures are the median of the
rounds, with the lowest and the highest in brackets; ratios are taken round by round. Measure them
again with `python -m benchmarks all` (or `make bench`), a single case with
`python -m benchmarks CASE`; `--quick` tries it out on tiny shapes.
"""


def write_report(results: Path, docs: Path) -> Path:
    """Write `benchmarks.md` and the plots it shows to the folder `docs`; returns the page's path.

    Raises:
        FileNotFoundError: `results` holds no JSON file of a case.
    """
    records = read_records(results, CASES)
    if not records:
        raise FileNotFoundError(
            f"{results}: holds no results; run `python -m benchmarks all` first"
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
        for table in module.tables(record):
            parts += [f"{table.heading}:", str(table)]
    path = docs / "benchmarks.md"
    with atomic_write(path) as partial:
        partial.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def _summary(records: list[Record]) -> list[str]:
    """The targets of all cases, and where each was measured."""
    targets = [target for record in records for target in record["targets"]]
    machines = Table(
        "Machines",
        ("case", "processor", "threads", "torch", "transformers", "date", "load before"),
        [
            (
                record["case"],
                (where := record["environment"]).get("gpu", where["cpu"]),
                f"{where['num_threads']} of {where['num_cores']} cores",
                where["versions"]["torch"],
                where["versions"]["transformers"],
                where["date"][:10],
                f"{where['load_at_start']:.2f}",
            )
            for record in records
        ],
    )
    parts = ["## Measured on", str(machines)]
    if targets:
        parts = ["## What is to be reached", str(targets_table(targets)), *parts]
    return parts


def _circumstances(record: Record) -> str:
    """How the case was run, and its checks, as one paragraph."""
    settings = describe_settings(record["settings"])
    return f"`{record['command']}`: {settings}. {describe_checks(record['checks'])}"
