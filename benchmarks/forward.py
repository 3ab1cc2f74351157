"""Attention forward only, without gradients, where FlexAttention can be compared on CPUs as well.

FlexAttention (Dong et al., arXiv 2412.05496) has no backward pass on CPUs, and needs a C++ compiler
there: where it cannot be compiled, it is left out, and the settings say why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_runs import Case, Checked, error, joint_bound, own_bound
from benchmarks.record import Measurement, Row
from benchmarks.tables import Table, seconds, times
from benchmarks.timing import Task, alternate, ratios, spread
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
    took = alternate(tasks, rounds=rounds, label=f"{label}, forward only")
    num_tokens = case.tree.num_tokens
    share = case.mask.num_visible / (num_tokens * (num_tokens + 1) // 2)
    rates = np.array(ratios(took["causal"], took["cpu"])) * share
    return {
        "elapsed_s": {name: spread(rounds) for name, rounds in took.items()},
        "speed_up": {
            name: spread(ratios(took[name], took["cpu"]))
            for name in ("flex", "dense")
            if name in took
        },
        "rate_of_causal": spread(rates.tolist()),
    }


def forward_table(rows: Sequence[Row]) -> list[Table]:
    """The table of the rows that hold a forward pass; none where no row does."""
    lines = []
    for row in rows:
        if "forward" not in row:
            continue
        took, faster = row["forward"]["elapsed_s"], row["forward"]["speed_up"]
        lines.append(
            (
                f"{row['num_turns']}",
                f"{row['num_tokens']:,}",
                *(seconds(took.get(name)) for name in ("cpu", "flex", "dense", "causal")),
                times(faster.get("flex")),
                times(faster["dense"]),
                times(row["forward"]["rate_of_causal"]),
            )
        )
    columns = (
        "turns",
        "tokens",
        "cpu backend",
        "FlexAttention",
        "dense SDPA, bool",
        "causal SDPA",
        "faster than FlexAttention",
        "than dense",
        "rate",
    )
    heading = "Forward only: time, and the cpu backend against the others"
    return [Table(heading, columns, lines)] if lines else []
