"""Figures as text: tables that read well in a terminal and in Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.record import Row

Columns = Mapping[str, Callable[[Row], str]]  # {name: what it shows of a row}


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, the column names, and one line of cells per row; all text."""

    heading: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """The table in Markdown, its columns aligned; the first one left, the others right."""
        cells = [list(self.columns), *map(list, self.lines)]
        widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(self.columns))]

        def draw(line: Sequence[str]) -> str:
            first, *others = zip(line, widths, strict=True)
            padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            return f"| {' | '.join(padded)} |"

        rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        return "\n".join([draw(cells[0]), draw(rule), *map(draw, cells[1:])])


def table(heading: str, rows: Iterable[Row], columns: Columns) -> Table:
    """The table of one line per row."""
    return Table(heading, [*columns], [[show(row) for show in columns.values()] for row in rows])


def seconds(spread: dict[str, float] | None) -> str:
    """Median and range of a duration, in a unit that suits it."""
    if spread is None:
        return "-"
    median = spread["median"]
    factor, unit = (1, "s") if median >= 1 else (1e3, "ms") if median >= 1e-4 else (1e6, "µs")
    low, high = spread["low"] * factor, spread["high"] * factor
    return f"{median * factor:.3g} {unit} ({low:.3g}-{high:.3g})"


def times(spread: dict[str, float] | None) -> str:
    """Median and range of a ratio."""
    if spread is None:
        return "-"
    low, high = _short(spread["low"]), _short(spread["high"])
    return f"{_short(spread['median'])} ({low}-{high})"


def size(num_bytes: float | None) -> str:
    """A size in KiB or MiB."""
    if num_bytes is None:
        return "-"
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"


def targets_table(targets: Sequence[dict[str, Any]]) -> Table:
    """What was to be reached, and what was."""
    columns: Columns = {
        "target": lambda row: row["name"],
        "goal": lambda row: f"at {'most' if row['is_most'] else 'least'} {_short(row['goal'])}",
        "measured": lambda row: _short(row["measured"]),
        "reached": lambda row: "yes" if row["is_reached"] else "no",
    }
    return table("Targets", targets, columns)


def gather_table(rows: Iterable[Row]) -> Table:
    """What the `varlen` backend calls and gathers for rows of `kernel_cost.varlen_cost`."""
    columns: Columns = {
        "row": lambda row: row["name"],
        "tokens": lambda row: f"{row['tokens']:,}",
        "N-pass tokens": lambda row: f"{row['num_npass_tokens']:,}",
        "sequences": lambda row: f"{row['sequences']:,}",
        "gathered keys": lambda row: f"{row['keys']:,}",
        "K and V": lambda row: size(row["num_bytes"]),
        "calls forward, backward": lambda row: ", ".join(map(str, row["num_calls"])),
        "pairs a key": lambda row: f"{row['pairs'] / row['keys']:.0f}",
        '"auto"': lambda row: row["auto"],
    }
    return table("What `varlen` gathers", rows, columns)


def describe_machine(environment: dict[str, Any]) -> str:
    """GPU, processor, threads and versions in one line, of what `describe_environment` returns."""
    versions = [f"{name} {number}" for name, number in environment["versions"].items() if number]
    threads = environment["num_threads"]
    machine = f"{environment['cpu']}, {_count(threads, 'thread')}"
    if "gpu" in environment:
        machine = f"{environment['gpu']}, CUDA {environment['cuda']}; {machine}"
    return f"{machine}; {', '.join(versions)}"


def describe_settings(settings: dict[str, Any]) -> str:
    """The settings in one line, such as "turn 60/300/120, num heads 8, dtype float32"."""
    return ", ".join(f"{name.replace('_', ' ')} {_plain(x)}" for name, x in settings.items())


def describe_checks(checks: Sequence[dict[str, Any]]) -> str:
    """A sentence about the checks that came before the figures, and the closest call of them."""
    if not checks:
        return "Nothing was checked."
    closest = max(checks, key=lambda check: check["value"] / (check["bound"] or 1))
    return (
        f"Checked first, and passed: {len(checks)} of {len(checks)}. Closest to its bound: "
        f"{closest['name']} ({closest['value']:.1e}, bound {closest['bound']:.1e})."
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(value: float) -> str:
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
