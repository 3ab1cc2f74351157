"""Tables, plot and targets of the kernels' benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_methods import METHODS
from benchmarks.kernel_parts import SLOWER
from benchmarks.plots import draw_bars
from benchmarks.record import Record, Row, Target
from benchmarks.tables import Columns, Table, gather_table, seconds, size, table, times

_RATES: dict[int, tuple[float, float]] = {  # {head width: TFLOP/s at least, forward and backward}
    128: (430, 330),
    64: (380, 300),
}
_LONG, _SHORT, _PAPER = (1.2, 1.5), (1.8, 2.0), 2.5  # times faster than FlexAttention
_VARLEN = (1.2, 1.4)  # the same of varlen, forward and backward


def tables(record: Record) -> list[Table]:
    rows, directions = record["rows"], ("forward", "backward")
    found = [_by_method(f"TFLOP/s, {d}", rows, "tflops", d, times) for d in directions]
    found += [_by_method(f"Time, {d}", rows, "elapsed_s", d, seconds) for d in directions]
    for ours, kind in SLOWER.items():
        for direction in (*directions, "both"):
            heading = f"Time / time of {METHODS[ours]}, {direction}"
            found.append(_by_method(heading, rows, kind, direction, times))
    tuned = _tuning(record["details"]["tuning"])
    gathered = gather_table(row | row["gather"] | {"name": _label(row)} for row in rows)
    return [*found, *_host(rows), *tuned, _costs(rows), gathered, *_left_out(rows)]


def _by_method(
    heading: str, rows: Sequence[Row], kind: str, direction: str, show: Callable[[Any], str]
) -> Table:
    """One line per row, one column per method that has a figure in any of them."""
    columns = {"row": _label} | {
        METHODS[name]: lambda row, name=name: show(row[kind][direction].get(name))
        for name in METHODS
        if any(name in row[kind][direction] for row in rows)
    }
    return table(heading, rows, columns)


def _host(rows: Sequence[Row]) -> list[Table]:
    """Where the host needs longer to queue a pass than the device to run it, it sets the pace."""

    def share(row: Row, name: str) -> str:
        host_s = row["host_s"].get(name)
        return "-" if host_s is None else f"{host_s / row['elapsed_s'][name]['median']:.2f}"

    passes = [
        {"label": f"{_label(row)}, {direction}"}
        | {kind: row[kind][direction] for kind in ("host_s", "elapsed_s")}
        for row in rows
        for direction in ("forward", "backward")
    ]
    if not any(each["host_s"] for each in passes):
        return []
    columns = {"row": lambda row: row["label"]} | {
        METHODS[name]: lambda row, name=name: share(row, name) for name in METHODS
    }
    heading = "Host time / device time; above 1, a single layer waits for the host"
    return [table(heading, passes, columns)]


def _tuning(tuning: dict[str, dict[str, Row]]) -> list[Table]:
    """What was chosen, and how much faster it is than what is shipped, which is tried first."""
    lines = []
    for width, kernels in tuning.items():
        for kernel, found in kernels.items():
            name = f"{kernel}, D {width}"
            if "failure" in found:
                lines.append((name, "as shipped", "-", "-", found["failure"]))
                continue
            (_, shipped_ms, _), *_ = trials = found["trials"]
            block_q, block_k, warps, stages, use_tma = found["config"]
            chosen = f"{block_q} x {block_k}, {warps} warps, {stages} stages" + ", TMA" * use_tma
            failed = sum(ms is None for _, ms, _ in trials)
            tried = f"{len(trials)} of {found['num_candidates']}, {failed} failed"
            own_ms = f"{found['elapsed_ms']:.3f} ms"
            lines.append((name, chosen, own_ms, f"{shipped_ms:.3f} ms", tried))
    columns = ("kernel", "chosen", "its pass", "as shipped", "tried")
    return [Table("Configurations", columns, lines)] if lines else []


def _costs(rows: Sequence[Row]) -> Table:
    launches = [
        {"label": f"{_label(row)}, {kernel}"} | cost
        for row in rows
        for kernel, cost in row["cost"].items()
    ]
    columns: Columns = {
        "row and kernel": lambda row: row["label"],
        "tile": lambda row: f"{row['config'][0]} x {row['config'][1]}",
        "full tiles": lambda row: f"{row['num_full']:,}",
        "partial tiles": lambda row: f"{row['num_partial']:,}",
        "TFLOP on visible pairs": lambda row: f"{row['num_flops'] / 1e12:.3g}",
        "visible / visited": lambda row: f"{row['num_flops'] / row['num_tile_flops']:.3f}",
        "bytes, at least": lambda row: size(row["num_bytes"]),
    }
    return table("What the kernels have to do, counted", launches, columns)


def _left_out(rows: Sequence[Row]) -> list[Table]:
    """What has no figure and why; rows of one reason in one line."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            method, comma, direction = name.partition(",")
            where.setdefault((METHODS[method] + comma + direction, reason), []).append(_label(row))
    lines = [
        (method, "all rows" if len(labels) == len(rows) else "; ".join(labels), reason)
        for (method, reason), labels in where.items()
    ]
    return [Table("Without a figure", ("method", "rows", "reason"), lines)] if lines else []


def draw(record: Record, path: Path) -> str:
    widest = max(row["head_width"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["head_width"] == widest]
    names = [name for name in METHODS if any(name in row["tflops"]["forward"] for row in rows)]
    passes = [(row, direction) for row in rows for direction in ("forward", "backward")]
    none = {"median": 0.0}
    draw_bars(
        [f"{row['name'].replace(' to ', chr(10) + 'to ')}\n{d}" for row, d in passes],
        {
            METHODS[name]: [row["tflops"][d].get(name, none)["median"] for row, d in passes]
            for name in names
        },
        path,
        x_label=f"row, head width {widest}",
        y_label="TFLOP/s on visible pairs",
    )
    return f"TFLOP/s on visible pairs, head width {widest}; what was not measured has no bar"


def targets(rows: Sequence[Row]) -> list[Target]:
    """The goals of which every figure is there; the lowest of the rows counts."""
    found = []
    long = [row for row in rows if not row["is_short"]]
    short = [row for row in rows if row["is_short"]]
    for width, goals in _RATES.items():
        for direction, goal in zip(("forward", "backward"), goals, strict=True):
            rates = _medians(
                [r for r in long if r["head_width"] == width], "tflops", direction, ["triton"]
            )
            name = f"TFLOP/s {direction}, D {width}, lowest of the long rows measured"
            found += [Target(name, goal, min(rates))] if rates else []
    for group, factors, kind in ((long, _LONG, "long"), (short, _SHORT, "short")):
        for direction, goal in zip(("forward", "backward"), factors, strict=True):
            ratios = _medians(group, "slower", direction, ["flex", "flex_tma"])
            name = (
                f"times faster than FlexAttention, {direction}, lowest of the {kind} rows measured"
            )
            found += [Target(name, goal, min(ratios))] if ratios else []
    for direction, goal in zip(("forward", "backward"), _VARLEN, strict=True):
        ratios = _medians(long, "slower_than_varlen", direction, ["flex"])
        name = f"times varlen is faster than FlexAttention, {direction}, lowest of the long rows"
        found += [Target(name, goal, min(ratios))] if ratios else []
    ratios = _medians(rows, "slower", "both", ["flex_paper"])
    name = "times faster than FlexAttention on the paper's order, lowest of the rows measured"
    return found + ([Target(name, _PAPER, min(ratios))] if ratios else [])


def _medians(rows: Sequence[Row], kind: str, direction: str, names: Sequence[str]) -> list[float]:
    figures = (row[kind][direction].get(name) for row in rows for name in names)
    return [figure["median"] for figure in figures if figure is not None]


def _label(row: Row) -> str:
    return f"{row['name']}, D {row['head_width']}"
