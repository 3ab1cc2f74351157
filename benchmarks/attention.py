"""Attention alone, forward and backward: the `cpu` backend against what else runs on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.attention_runs import (
    Case,
    check_case,
    make_case,
    npass_inputs,
    pack_npass,
    run_causal,
    run_cpu,
    run_dense,
    run_npass,
)
from benchmarks.conversations import Turn
from benchmarks.forward import forward_table, measure_forward
from benchmarks.plots import draw_bars
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Columns, Table, seconds, table, times
from benchmarks.timing import Task, compare, scaled
from flexmask import PrefixTree

TITLE = "Attention, forward and backward"
ABOUT = """\
One conversation whose turns have 100 context, 600 reasoning and 200 response tokens, as one row:
8 heads of 64, fp32. The `cpu` backend against SDPA with the dense mask (boolean, and once as the
fp32 mask that SDPA turns it into; both made beforehand), against causal SDPA over a row of the same
length (which sees more: the yardstick is its rate per visible pair), against N-pass (each sample
causal, one call each), and against packed N-pass (the samples end to end in one row, each seeing
itself only, through the same `cpu` backend, since SDPA has no packing on CPUs). Before: outputs and
gradients of the first head against fp64, where the `cpu` backend may err at most twice as much as
dense SDPA does, and all heads against dense SDPA and N-pass, within the sum of both errors.

Forward only, without gradients, FlexAttention takes part: the `flex` backend, compiled before it is
timed, its block tables made in every call. It has no backward pass on CPUs. Its output is held to
the same bounds."""

_TURN: Turn = (100, 600, 200)
_NUM_TURNS, _FORWARD_NUM_TURNS = (2, 4, 8, 16), (4, 8)


def measure(*, quick: bool) -> Measurement:
    turn, numbers = ((4, 24, 8), (2, 3)) if quick else (_TURN, _NUM_TURNS)
    forward_numbers = (2,) if quick else _FORWARD_NUM_TURNS
    num_heads, width = (2, 16) if quick else (8, 64)
    measurement = Measurement(
        settings={
            "turn": turn,
            "num_heads": num_heads,
            "head_width": width,
            "dtype": "float32",
            "rounds": 2 if quick else 3,
        }
    )
    for number in numbers:
        case = make_case(PrefixTree.from_turns([turn] * number), num_heads, width)
        label = f"{number} turns"
        checked = check_case(case, label, measurement)
        row: Row = {"num_turns": number} | _measure(case, label, measurement)
        if number in forward_numbers:
            row["forward"] = measure_forward(case, checked, label, measurement)
        measurement.rows.append(row)
    if not quick:
        measurement.targets = _targets(measurement.rows[-1])
    return measurement


def _measure(case: Case, label: str, measurement: Measurement) -> Row:
    samples = npass_inputs(case)
    packed_row, packed_mask = pack_npass(case, samples)
    added = torch.zeros(case.dense.shape).masked_fill_(~case.dense, float("-inf"))
    tasks = {
        "cpu": Task(lambda: run_cpu(case.inputs, case.mask)),
        "dense": Task(lambda: run_dense(case.inputs, case.dense)),
        "dense_fp32": Task(lambda: run_dense(case.inputs, added), rounds=1),
        "causal": Task(lambda: run_causal(case.inputs)),
        "npass": Task(lambda: run_npass(samples)),
        "packed_npass": Task(lambda: run_cpu(packed_row, packed_mask)),
    }
    found = compare(tasks, "cpu", rounds=measurement.settings["rounds"], label=label)
    num_tokens, num_visible = case.tree.num_tokens, case.mask.num_visible
    share = num_visible / (num_tokens * (num_tokens + 1) // 2)
    return {
        "num_tokens": num_tokens,
        "num_sample_tokens": case.tree.num_sample_tokens,
        "num_visible": num_visible,
        "num_visible_npass": packed_mask.num_visible,
        **found,
        "rate_of_causal": scaled(found["speed_up"]["causal"], share),
    }


def _targets(row: Row) -> list[Target]:
    where = f"{row['num_tokens']:,} tokens"
    return [
        Target(
            f"times faster than SDPA with a dense mask, {where}",
            6,
            row["speed_up"]["dense"]["median"],
        ),
        Target(
            f"rate per visible pair of that of causal SDPA, {where}",
            0.9,
            row["rate_of_causal"]["median"],
        ),
    ]


def tables(record: Record) -> list[Table]:
    conversation: Columns = {
        "turns": lambda row: f"{row['num_turns']}",
        "tokens": lambda row: f"{row['num_tokens']:,}",
    }
    elapsed: Columns = {
        "cpu backend": lambda row: seconds(row["elapsed_s"]["cpu"]),
        "dense SDPA, bool": lambda row: seconds(row["elapsed_s"]["dense"]),
        "dense SDPA, fp32": lambda row: seconds(row["elapsed_s"]["dense_fp32"]),
        "causal SDPA": lambda row: seconds(row["elapsed_s"]["causal"]),
        "N-pass": lambda row: seconds(row["elapsed_s"]["npass"]),
        "packed N-pass": lambda row: seconds(row["elapsed_s"]["packed_npass"]),
    }
    compared: Columns = {
        "visible pairs": lambda row: f"{row['num_visible']:,}",
        "dense, bool": lambda row: times(row["speed_up"]["dense"]),
        "dense, fp32": lambda row: times(row["speed_up"]["dense_fp32"]),
        "rate": lambda row: times(row["rate_of_causal"]),
        "N-pass": lambda row: times(row["speed_up"]["npass"]),
        "packed N-pass": lambda row: times(row["speed_up"]["packed_npass"]),
    }
    heading = "The cpu backend: times faster than, and rate per visible pair of causal SDPA's"
    return [
        table("Time: median (lowest-highest)", record["rows"], {**conversation, **elapsed}),
        table(heading, record["rows"], {**conversation, **compared}),
        *forward_table(record["rows"]),
    ]


def draw(record: Record, path: Path) -> str:
    rows = record["rows"]
    shown = {
        "dense": "than SDPA with a dense mask",
        "npass": "than N-pass",
        "packed_npass": "than packed N-pass",
    }
    draw_bars(
        [f"{row['num_turns']} turns\n{row['num_tokens']:,} tokens" for row in rows],
        {label: [row["speed_up"][name]["median"] for row in rows] for name, label in shown.items()},
        path,
        x_label="conversation",
        y_label="cpu backend, times faster",
    )
    return "How many times faster attention of the cpu backend is, forward and backward"
