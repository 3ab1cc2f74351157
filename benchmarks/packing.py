"""Rows under a token budget: how full, and how equal in cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from benchmarks.plots import draw_bars
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Columns, Table, seconds, table
from benchmarks.timing import Task, alternate, spread
from flexmask import PrefixTree, TreeBatchSampler, TreeCollator, pack
from flexmask.data.files import read_conversations
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.packing.epoch import EpochPlan
from flexmask.packing.sampler import PAIRS_PER_TOKEN

TITLE = "Packing"
ABOUT = """\
The shipped tutoring conversations, repeated to 1M tokens, as rows of at most 16,384 tokens for 1 to
64 data-parallel processes, one row a batch: how many rows, how full they are, and how much the
predicted cost (tokens + visible pairs / 24,576) of a batch differs between processes, as (largest -
smallest) / mean. Waiting is the share of all processes' time, by predicted cost, in which they wait
for the slowest of their step. By count: batches of as many conversations each, in random order, as
a plain data loader makes them. No packing has fewer rows than the bound L2 of Martello and Toth
says; the number of rows is a multiple of that of the processes. Where they are at hand, 50 public
conversations with tool calls are packed too (the demo of reasoning with tools of LLaMA-Factory).
Before: every tree is in one batch, packed rows are within the budget, and every trained token is
trained once."""

_REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "reason_tool_use.jsonl"
_MAX_TOKENS = 16_384
_PROCESSES = (1, 2, 8, 64)
_ROUNDS = 5


def measure(*, quick: bool) -> Measurement:
    trees = _render(DATA_PATH, 12 if quick else None)
    repeated = _repeat(trees, 30_000 if quick else 1_000_000)
    max_tokens = 4096 if quick else _MAX_TOKENS
    measurement = Measurement(
        settings={
            "num_trees": len(repeated),
            "num_tokens": sum(tree.num_tokens for tree in repeated),
            "max_tokens": max_tokens,
            "pairs_per_token": PAIRS_PER_TOKEN,
            "rounds": _ROUNDS,
        }
    )
    for num_processes in _PROCESSES[:3] if quick else _PROCESSES:
        row = _measure_rows(measurement, repeated, "tutoring", max_tokens, num_processes)
        if num_processes == 1:
            _add_time(row, repeated, max_tokens)
        measurement.rows.append(row)
    if not quick:
        if _REAL_DATA.is_file():
            real = _render(_REAL_DATA, None)
            measurement.rows += [
                _measure_rows(measurement, real, "tool use", max_tokens, num_processes)
                for num_processes in (1, 8)
            ]
        measurement.rows.append(_measure_many(trees, max_tokens))
        _set_targets(measurement)
    return measurement


def _render(path: Path, number: int | None) -> list[PrefixTree]:
    from transformers import AutoTokenizer

    collator = TreeCollator(AutoTokenizer.from_pretrained(TOKENIZER_PATH))
    conversations = list(read_conversations(path))[:number]
    return [collator.tree(conversation) for conversation in conversations]


def _repeat(trees: Sequence[PrefixTree], num_tokens: int) -> list[PrefixTree]:
    """The trees, again and again, until they have at least so many tokens."""
    taken: list[PrefixTree] = []
    total = 0
    for tree in cycle(trees):
        if total >= num_tokens:
            return taken
        taken.append(tree)
        total += tree.num_tokens
    return taken


def _measure_rows(
    measurement: Measurement,
    trees: Sequence[PrefixTree],
    data: str,
    max_tokens: int,
    num_processes: int,
) -> Row:
    """Check and count one plan, packed for real."""
    name = f"{data}, {num_processes} processes"
    sampler = TreeBatchSampler(trees, max_tokens=max_tokens, num_processes=num_processes)
    plan = sampler.plan()
    batches = [batch for batch in plan.batches if batch]
    rows = [row for batch in batches for row in pack([trees[i] for i in batch], max_tokens)]
    times = np.bincount([index for batch in batches for index in batch], minlength=len(trees))
    measurement.check(f"{name}: trees not in one batch", int((times != 1).sum()), 0)
    measurement.check(f"{name}: tokens of a row", max(map(len, rows)), max_tokens)
    measurement.check(f"{name}: rows packed", len(rows), plan.num_rows)
    weight = sum(float(tree.loss_weights.sum()) for tree in trees if tree.loss_weights is not None)
    difference = abs(sum(row.loss_weights.sum() for row in rows) - weight)
    measurement.check(f"{name}: trained tokens", float(difference), 0)
    padded = sum(-(-len(row) // 128) * 128 for row in rows)
    by_count = _by_count(trees, plan)
    return {
        "kind": "rows",
        "data": data,
        "num_processes": num_processes,
        "num_rows": plan.num_rows,
        "fewest_rows": plan.fewest_rows,
        "fill": plan.fill,
        "padding": 1 - plan.tokens.sum() / padded,
        "step_spread": float(plan.step_spreads.max()),
        "run_spread": plan.run_spread,
        "waiting": plan.waiting,
        "by_count_step_spread": float(by_count.step_spreads.max()),
        "by_count_waiting": by_count.waiting,
        "seconds": None,
    }


def _by_count(trees: Sequence[PrefixTree], plan: EpochPlan) -> EpochPlan:
    """The costs of as many batches with about the same number of trees each, in random order."""
    costs = np.array([tree.num_tokens + tree.num_pairs / PAIRS_PER_TOKEN for tree in trees])
    order = np.random.default_rng(0).permutation(len(trees))
    parts = np.array_split(order, plan.rows.size)
    sums = np.array([costs[part].sum() for part in parts]).reshape(plan.rows.shape)
    return EpochPlan([part.tolist() for part in parts], plan.rows, plan.tokens, sums, 0, 0)


def _measure_many(trees: Sequence[PrefixTree], max_tokens: int) -> Row:
    """100,000 conversations, of which only sizes are known."""
    many = list(islice(cycle(trees), 100_000))
    sampler = TreeBatchSampler(many, max_tokens=max_tokens, num_processes=8)
    row = {
        "kind": "many",
        "num_trees": len(many),
        "num_rows": sampler.num_rows,
        "fewest_rows": sampler.fewest_rows,
        "fill": sampler.plan().fill,
        "step_spread": float(sampler.plan().step_spreads.max()),
    }
    _add_time(row, many, max_tokens)
    return row


class _Sizes:
    """What the sampler looks at, so that collecting it is not timed."""

    def __init__(self, trees: Sequence[PrefixTree]) -> None:
        self.num_tokens = np.array([tree.num_tokens for tree in trees])
        self.num_pairs = np.array([tree.num_pairs for tree in trees])

    def __len__(self) -> int:
        return self.num_tokens.size


def _add_time(row: Row, trees: Sequence[PrefixTree], max_tokens: int) -> None:
    sizes = _Sizes(trees)

    def plan() -> EpochPlan:
        return TreeBatchSampler(sizes, max_tokens=max_tokens, num_processes=8).plan()

    times = alternate({"plan": Task(plan)}, rounds=_ROUNDS, label=f"{len(trees):,} trees")
    row["seconds"] = spread(times["plan"])


def _set_targets(measurement: Measurement) -> None:
    rows = {
        (row["data"], row["num_processes"]): row
        for row in measurement.rows
        if row["kind"] == "rows"
    }
    (many,) = (row for row in measurement.rows if row["kind"] == "many")
    one = rows["tutoring", 1]
    targets = measurement.targets
    targets.append(Target("fill of rows of 16,384 tokens, 1M tokens", 0.98, one["fill"]))
    if ("tool use", 1) in rows:
        real = rows["tool use", 1]
        name = f"rows for the tool use conversations (fewest: {real['fewest_rows']})"
        targets.append(Target(name, real["fewest_rows"], real["num_rows"], is_most=True))
    for num_processes in _PROCESSES[1:]:
        measured = rows["tutoring", num_processes]["step_spread"]
        name = f"spread of predicted cost in any step, {num_processes} processes"
        targets.append(Target(name, 0.03, measured, is_most=True))
    for name, goal, row in (("1M tokens", 0.5, one), ("100,000 trees", 5.0, many)):
        median = row["seconds"]["median"]
        targets.append(Target(f"seconds to plan {name}", goal, median, is_most=True))


def tables(record: Record) -> list[Table]:
    columns: Columns = {
        "conversations": lambda row: row["data"],
        "processes": lambda row: str(row["num_processes"]),
        "rows": lambda row: f"{row['num_rows']:,}",
        "fewest": lambda row: f"{row['fewest_rows']:,}",
        "fill": lambda row: f"{row['fill']:.2%}",
        "padding to 128": lambda row: f"{row['padding']:.2%}",
        "spread in a step": lambda row: f"{row['step_spread']:.2%}",
        "over the run": lambda row: f"{row['run_spread']:.2%}",
        "waiting": lambda row: f"{row['waiting']:.2%}",
        "by count: spread": lambda row: f"{row['by_count_step_spread']:.1%}",
        "by count: waiting": lambda row: f"{row['by_count_waiting']:.1%}",
    }
    num_trees = record["settings"]["num_trees"]
    planned: Columns = {
        "conversations": lambda row: f"{row.get('num_trees', num_trees):,}",
        "rows": lambda row: f"{row['num_rows']:,}",
        "time": lambda row: seconds(row["seconds"]),
    }
    plans = [row for row in record["rows"] if row["kind"] == "rows"]
    timed = [row for row in record["rows"] if row.get("seconds")]
    return [
        table("Rows; spreads are the largest of any step", plans, columns),
        table("Time to plan an epoch for 8 processes", timed, planned),
    ]


def draw(record: Record, path: Path) -> str:
    rows = [
        row
        for row in record["rows"]
        if row["kind"] == "rows" and row["data"] == "tutoring" and row["num_processes"] > 1
    ]
    draw_bars(
        [str(row["num_processes"]) for row in rows],
        {
            "batches by count": [100 * row["by_count_waiting"] for row in rows],
            "rows by cost": [100 * row["waiting"] for row in rows],
        },
        path,
        x_label="data-parallel processes",
        y_label="waiting for the slowest, %",
    )
    return "Share of time spent on waiting for the slowest process of a step"
