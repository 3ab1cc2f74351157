"""Kinds of conversations against each other: few turns, many turns, and agents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.attention_runs import (
    NAMES,
    Case,
    check_case,
    error,
    joined,
    joint_bound,
    make_case,
    npass_inputs,
    pack_npass,
    run_cpu,
    run_npass,
)
from benchmarks.conversations import AgentTurn, Message, Turn, agent_tree
from benchmarks.plots import draw_bars
from benchmarks.record import Measurement, Record, Row
from benchmarks.tables import Columns, Table, seconds, table, times
from benchmarks.timing import Task, compare
from flexmask import PrefixTree

TITLE = "Kinds of conversations"
ABOUT = """\
The setting of arXiv 2504.18246, conversations of 1 to 5, 6 to 7 and 8 to 16 turns, and agents with
10 to 30 assistant messages. A turn has 30 to 90 context, 150 to 450 reasoning and 60 to 180
response tokens. An agent's turn has a user's message of 30 to 90 tokens and 3 to 7 assistant
messages: 40 to 160 tokens of reasoning each, tool calls of 15 to 45, their results of 20 to 140 and
an answer of 60 to 180. The reasoning is kept through the tool calls of a turn and dropped when the
user speaks again. Lengths are drawn at random, always the same.

Attention forward and backward, fp32: the `cpu` backend with one row per conversation against N-pass
(each sample causal SDPA, one call each) and packed N-pass (the samples of a conversation end to end
in one row, each seeing itself only, through the same `cpu` backend). An agent's messages within a
turn extend one another; merged N-pass takes only the last of each turn, which trains them all and
asks for no mask. Times are sums over the conversations of a kind. Before: the same checks as for
attention alone, for each conversation."""

_BLOCK = 128


class Shape(NamedTuple):
    """A kind of conversations: what makes the tree of one from its size, and the sizes."""

    make: Callable[[int, int], PrefixTree]
    sizes: tuple[int, ...]  # turns, or an agent's assistant messages


def turns_tree(num_turns: int, divisor: int = 1) -> PrefixTree:
    """A conversation of random lengths, each divided by `divisor`."""
    rng = np.random.default_rng(num_turns)

    def turn() -> Turn:
        context, reasoning = _draw(rng, 30, 90, divisor), _draw(rng, 150, 450, divisor)
        return context, reasoning, _draw(rng, 60, 180, divisor)

    return PrefixTree.from_turns([turn() for _ in range(num_turns)])


def agent_turns(num_messages: int, divisor: int = 1) -> list[AgentTurn]:
    """An agent's conversation with random lengths, each divided by `divisor`."""
    rng = np.random.default_rng(num_messages)
    turns = []
    while num_messages:
        number = min(num_messages, int(rng.integers(3, 8)))
        num_messages -= number
        messages = [
            Message(
                reasoning=_draw(rng, 40, 160, divisor),
                text=_draw(rng, 15, 45, divisor),
                result=_draw(rng, 20, 140, divisor),
            )
            for _ in range(number - 1)
        ]
        reasoning, answer = _draw(rng, 40, 160, divisor), _draw(rng, 60, 180, divisor)
        messages.append(Message(reasoning, answer, result=0))
        turns.append(AgentTurn(_draw(rng, 30, 90, divisor), messages))
    return turns


def _draw(rng: np.random.Generator, low: int, high: int, divisor: int) -> int:
    return int(rng.integers(low, high + 1)) // divisor


def _agent(num_messages: int, divisor: int = 1) -> PrefixTree:
    return agent_tree(agent_turns(num_messages, divisor))


_SHAPES = {
    "1 to 5 turns": Shape(turns_tree, (1, 2, 3, 4, 5)),
    "6 to 7 turns": Shape(turns_tree, (6, 7)),
    "8 to 16 turns": Shape(turns_tree, (8, 12, 16)),
    "agents, 10 to 30 messages": Shape(_agent, (10, 20, 30)),
}
_QUICK_SHAPES = {
    "1 to 2 turns": Shape(turns_tree, (1, 2)),
    "agents, 10 messages": Shape(_agent, (10,)),
}


def measure(*, quick: bool) -> Measurement:
    num_heads, width, divisor = (2, 16, 10) if quick else (4, 64, 1)
    measurement = Measurement(
        settings={
            "num_heads": num_heads,
            "head_width": width,
            "dtype": "float32",
            "block": _BLOCK,
            "rounds": 2 if quick else 3,
        }
    )
    for name, shape in (_QUICK_SHAPES if quick else _SHAPES).items():
        trees = [shape.make(size, divisor) for size in shape.sizes]
        cases = [make_case(tree, num_heads, width) for tree in trees]
        merged = [_without_prefixes(case) for case in cases]
        for size, case, few in zip(shape.sizes, cases, merged, strict=True):
            _check(case, few, f"{name}, size {size}", measurement)
        row = {"shape": name, "sizes": shape.sizes} | _count(cases, merged)
        measurement.rows.append(row | _time(cases, merged, name, measurement))
    return measurement


def _without_prefixes(case: Case) -> Case:
    """The case without the samples that are the beginning of another one."""
    inner = {segment.parent for segment in case.tree.segments}
    pairs = zip(case.tree.leaves, case.samples, strict=True)
    return case._replace(samples=[index for leaf, index in pairs if leaf.segment not in inner])


def _check(case: Case, merged: Case, label: str, measurement: Measurement) -> None:
    missing = abs(case.mask.num_visible - case.tree.num_pairs)
    measurement.check(f"visible pairs, {label}, against the tree", missing, 0)
    checked = check_case(case, label, measurement)
    if len(merged.samples) == len(case.samples):
        return
    results = joined(merged, run_npass(npass_inputs(merged)))
    for i, name in enumerate(NAMES):
        difference = error(checked.ours[i][0], results[i][0])
        bound = joint_bound(checked.dense_errors[i])
        measurement.check(f"{name}, {label}, against merged N-pass", difference, bound)


def _count(cases: list[Case], merged: list[Case]) -> Row:
    """Tokens, visible pairs and tiles, over all conversations of a shape."""

    def lengths(cases: list[Case]) -> np.ndarray:
        return np.array([index.numel() for case in cases for index in case.samples])

    def num_pairs(lengths: np.ndarray) -> int:
        return int((lengths * (lengths + 1) // 2).sum())

    num_tokens = sum(case.tree.num_tokens for case in cases)
    num_visible = sum(case.mask.num_visible for case in cases)
    num_tiles = sum(case.mask.tiles(_BLOCK, _BLOCK)[0].num_visited for case in cases)
    row: Row = {
        "num_tokens": {"single_pass": num_tokens},
        "num_visible": {"single_pass": num_visible},
        "token_ratio": {},
        "pair_ratio": {},
        "num_visited_tiles": num_tiles,
        "density": num_visible / (num_tiles * _BLOCK**2),
    }
    for name, chosen in (("npass", cases), ("merged_npass", merged)):
        found = lengths(chosen)
        row["num_tokens"][name], row["num_visible"][name] = int(found.sum()), num_pairs(found)
        row["token_ratio"][name] = row["num_tokens"][name] / num_tokens
        row["pair_ratio"][name] = row["num_visible"][name] / num_visible
    return row


def _time(cases: list[Case], merged: list[Case], label: str, measurement: Measurement) -> Row:
    """Attention of all conversations of a shape, in every way."""
    samples = [npass_inputs(case) for case in cases]
    packed = [pack_npass(*pair) for pair in zip(cases, samples, strict=True)]
    tasks = {
        "cpu": Task(lambda: [run_cpu(case.inputs, case.mask) for case in cases]),
        "npass": Task(lambda: [run_npass(inputs) for inputs in samples]),
        "packed_npass": Task(lambda: [run_cpu(*pair) for pair in packed]),
    }
    if any(len(a.samples) != len(b.samples) for a, b in zip(cases, merged, strict=True)):
        fewer = [npass_inputs(case) for case in merged]
        tasks["merged_npass"] = Task(lambda: [run_npass(inputs) for inputs in fewer])
    return compare(tasks, "cpu", rounds=measurement.settings["rounds"], label=label)


def tables(record: Record) -> list[Table]:
    counts: Columns = {
        "conversations": lambda row: row["shape"],
        "sizes": lambda row: "/".join(map(str, row["sizes"])),
        "tokens, N-pass": lambda row: f"{row['num_tokens']['npass']:,}",
        "tokens, single-pass": lambda row: f"{row['num_tokens']['single_pass']:,}",
        "token ratio": lambda row: f"{row['token_ratio']['npass']:.2f}",
        "merged": lambda row: f"{row['token_ratio']['merged_npass']:.2f}",
        "pair ratio": lambda row: f"{row['pair_ratio']['npass']:.2f}",
        "density": lambda row: f"{row['density']:.3f}",
    }
    elapsed: Columns = {
        "conversations": lambda row: row["shape"],
        "cpu backend": lambda row: seconds(row["elapsed_s"]["cpu"]),
        "N-pass": lambda row: seconds(row["elapsed_s"]["npass"]),
        "packed N-pass": lambda row: seconds(row["elapsed_s"]["packed_npass"]),
        "merged N-pass": lambda row: seconds(row["elapsed_s"].get("merged_npass")),
        "than N-pass": lambda row: times(row["speed_up"]["npass"]),
        "than packed": lambda row: times(row["speed_up"]["packed_npass"]),
        "than merged": lambda row: times(row["speed_up"].get("merged_npass")),
    }
    of_counts = (
        "Counts; ratios are N-pass / single-pass, density is visible pairs / area of visited "
        "128 x 128 tiles, heavy first"
    )
    of_times = (
        "Attention, forward and backward: median (lowest-highest), and how many times faster "
        "the cpu backend is"
    )
    rows = record["rows"]
    return [table(of_counts, rows, counts), table(of_times, rows, elapsed)]


def draw(record: Record, path: Path) -> str:
    rows = record["rows"]
    draw_bars(
        [row["shape"].replace(", ", ",\n") for row in rows],
        {
            "attention, than N-pass": [row["speed_up"]["npass"]["median"] for row in rows],
            "than packed N-pass": [row["speed_up"]["packed_npass"]["median"] for row in rows],
            "token ratio": [row["token_ratio"]["npass"] for row in rows],
        },
        path,
        x_label="conversations",
        y_label="times faster, and token ratio",
    )
    return "How many times faster attention is by kind of conversation, and the ratio of tokens"
