"""What a case hands over, and the JSON file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexmask.files import atomic_write

Row = dict[str, Any]
Record = dict[str, Any]


class CheckFailedError(Exception):
    """A result that is wrong, so that no figure about it may be reported."""


@dataclass(frozen=True, slots=True)
class Check:
    """A correctness check that passed: `value` is at most `bound`."""

    name: str
    value: float
    bound: float


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is meant to reach, and what it did; is_most where it is an upper limit."""

    name: str
    goal: float
    measured: float
    is_most: bool = False

    @property
    def is_reached(self) -> bool:
        """Whether the measured value is on the right side of the goal."""
        return self.measured <= self.goal if self.is_most else self.measured >= self.goal


@dataclass(slots=True)
class Measurement:
    """The outcome of a case.

    Attributes:
        settings: shapes, dtypes and whatever else a reader needs to repeat it.
        checks: the correctness checks, all passed.
        rows: one dict per measured shape; durations in seconds, sizes in bytes.
        targets: what the figures are held against; none in a quick run.
        details: what is kept beside the rows, as plain data.
        wrong: results that are wrong, in words; what they belong to has no figure.
    """

    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def go_on_with(self, previous: Record) -> None:
        """Take over what the run of a record has found; targets follow from the rows."""
        self.rows = previous["rows"]
        self.checks = [Check(**check) for check in previous["checks"]]
        self.details = previous.get("details", {})

    def check(self, name: str, value: float, bound: float) -> None:
        """Note that `value` is at most `bound`.

        Raises:
            CheckFailedError: it is not, or it is not a number.
        """
        if not value <= bound:
            raise CheckFailedError(f"{name}: must be at most {bound:.3g}, got {value:.3g}")
        self.checks.append(Check(name, float(value), float(bound)))


def as_record(
    measurement: Measurement, *, case: str, is_quick: bool, command: str, environment: Row
) -> Record:
    """The measurement as plain data, with where, when and how it was made."""
    targets = [asdict(target) | {"is_reached": target.is_reached} for target in measurement.targets]
    return {
        "case": case,
        "is_quick": is_quick,
        "command": command,
        "environment": environment,
        "settings": measurement.settings,
        "checks": [asdict(check) for check in measurement.checks],
        "targets": targets,
        "rows": measurement.rows,
        **({"details": measurement.details} if measurement.details else {}),
        **({"wrong": measurement.wrong} if measurement.wrong else {}),
    }


def record_path(folder: Path, case: str, environment: Row) -> Path:
    """Where the record of a case is kept: `<case>-<device>.json`."""
    return folder / f"{case}-{environment['device']}.json"


def write_record(record: Record, folder: Path) -> Path:
    """Write the record whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, record["case"], record["environment"])
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read_records(folder: Path, cases: Sequence[str]) -> list[Record]:
    """The records in `folder`, sorted by case in the order of `cases`, then by device."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*-*.json"))]
    return sorted(records, key=lambda record: cases.index(record["case"]))
