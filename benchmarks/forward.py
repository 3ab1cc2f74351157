"""Attention forward only, without gradients, where FlexAttention can be compared on CPUs as well.

FlexAttention (Dong et al., arXiv 2412.05496) has no backward pass on CPUs, and needs a C++ compiler
there: where it cannot be compiled, it is left out, and the settings say why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_runs import Case, Checked, error, joint_bound, own_bound
from benchmarks.record import Measurement, Row
from benchmarks.tables import Columns, Table, seconds, table, times
from benchmarks.timing import Task, compare, scaled
from flexmask import attention


@torch.no_grad()
def measure_forward(case: Case, checked: Checked, label: str, measurement: Measurement) -> Row:
    """Time the forward pass in every way; outputs are checked first, against those in `checked`.

    Where FlexAttention cannot be compiled, `flex_left_out` of the settings says why.
    """
    q, k, v = (x.detach() for x in case.inputs[:3])

    def attend(backend: str) -> Tensor:
        return attention(q, k, v, case.mask, backend=backend)

    tasks = {
        "cpu": Task(lambda: attend("cpu")),
        "flex": Task(lambda: attend("flex")),
        "dense": Task(
            lambda: scaled_dot_product_attention(q, k, v, attn_mask=case.dense[None, None])
        ),
        "causal": Task(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)),
    }
    outputs = {"cpu": attend("cpu")}
    try:
        outputs["flex"] = attend("flex")
    except RuntimeError as failure:  # of dynamo, inductor or the C++ compiler
        reason = str(failure).strip().partition("\n")[0]
        measurement.settings["flex_left_out"] = f"{type(failure).__name__}: {reason}"
        del tasks["flex"]
    for name, out in outputs.items():
        where = f"output, {label}, forward only, {name}"
        dense_error = checked.dense_errors[0]
        own_error = error(out[0, :1], checked.precise[0][0])
        measurement.check(f"{where}, against fp64", own_error, own_bound(dense_error))
        difference = error(out[0], checked.dense[0][0])
        measurement.check(f"{where}, against dense SDPA", difference, joint_bound(dense_error))
    rounds = measurement.settings["rounds"]
    found = compare(tasks, "cpu", rounds=rounds, label=f"{label}, forward only")
    num_tokens = case.tree.num_tokens
    share = case.mask.num_visible / (num_tokens * (num_tokens + 1) // 2)
    return found | {"rate_of_causal": scaled(found["speed_up"]["causal"], share)}


def forward_table(rows: Sequence[Row]) -> list[Table]:
    """The table of the rows that hold a forward pass; none where no row does."""
    columns: Columns = {
        "turns": lambda row: f"{row['num_turns']}",
        "tokens": lambda row: f"{row['num_tokens']:,}",
        "cpu backend": lambda row: seconds(row["elapsed_s"]["cpu"]),
        "FlexAttention": lambda row: seconds(row["elapsed_s"].get("flex")),
        "dense SDPA, bool": lambda row: seconds(row["elapsed_s"]["dense"]),
        "causal SDPA": lambda row: seconds(row["elapsed_s"]["causal"]),
        "faster than FlexAttention": lambda row: times(row["speed_up"].get("flex")),
        "than dense": lambda row: times(row["speed_up"]["dense"]),
        "rate": lambda row: times(row["rate_of_causal"]),
    }
    measured = [row | row["forward"] for row in rows if "forward" in row]
    heading = "Forward only: time, and the cpu backend against the others"
    return [table(heading, measured, columns)] if measured else []
