"""Attention alone, forward and backward: the `cpu` backend against what else runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.conversations import Turn
from benchmarks.plots import draw_bars
from benchmarks.precise import attend_precisely
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Table, seconds, times
from benchmarks.timing import Task, alternate, ratios, spread
from flexmask import PrefixTree, Segment, TreeMask, attention, compile_mask
from flexmask.layout import lay_out
from flexmask.mask.dense import ancestry

TITLE = "Attention, forward and backward"
ABOUT = """\
One conversation whose turns have 100 context, 600 reasoning and 200 response tokens, as one row:
8 heads of 64, fp32. The `cpu` backend against SDPA with the dense mask (boolean, and once as the
fp32 mask that SDPA turns it into; both made beforehand), against causal SDPA over a row of the same
length (which sees more: the yardstick is its rate per visible pair), against N-pass (each sample
causal, one call each), and against packed N-pass (the samples end to end in one row, each seeing
itself only, through the same `cpu` backend, since SDPA has no packing on CPUs). Before: outputs and
gradients of the first head against fp64, where the `cpu` backend may err at most twice as much as
dense SDPA does, and all heads against dense SDPA and N-pass, within the sum of both errors."""

_TURN: Turn = (100, 600, 200)
_TOLERANCE = torch.finfo(torch.float32).eps  # for the last rounding of each result
_NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")

Results = tuple[Tensor, ...]  # out, dq, dk, dv; all [1, H, L, D]


class Inputs(NamedTuple):
    """Leaves q, k, v and the gradient of the output, all [1, H, L, D], as models lay them out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def at(self, index: Tensor, is_owned: Tensor) -> Inputs:
        """The rows of one sample as leaves of their own; dout only where it owns the token."""
        q, k, v, dout = (x.detach().transpose(1, 2)[:, index].transpose(1, 2) for x in self)
        return _leaves(q, k, v, dout * is_owned[index].unsqueeze(-1))


def _leaves(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Inputs:
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


class Case(NamedTuple):
    """A conversation's mask, its samples' packed positions, and random inputs."""

    tree: PrefixTree
    mask: TreeMask
    dense: Tensor
    samples: list[Tensor]
    inputs: Inputs


def measure(*, quick: bool) -> Measurement:
    turn, numbers = ((4, 24, 8), (2, 3)) if quick else (_TURN, (2, 4, 8, 16))
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
        case = _case([turn] * number, num_heads, width)
        label = f"{number} turns"
        _check(case, label, measurement)
        measurement.rows.append({"num_turns": number} | _measure(case, label, measurement))
    if not quick:
        measurement.targets = _targets(measurement.rows[-1])
    return measurement


def _case(turns: list[Turn], num_heads: int, width: int) -> Case:
    tree = PrefixTree.from_turns(turns)
    generator = torch.Generator().manual_seed(0)
    shape = (1, tree.num_tokens, num_heads, width)
    q, k, v, dout = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4))
    inputs = _leaves(q, k, v, dout)
    starts = lay_out(tree).starts
    samples = [
        torch.cat(
            [
                torch.arange(starts[s], starts[s] + tree.segments[s].length)
                for s in tree.path(leaf.segment)
            ]
        )
        for leaf in tree.leaves
    ]
    return Case(tree, compile_mask(tree), torch.from_numpy(ancestry(tree)), samples, inputs)


def _run(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Results:
    """Output and gradients of one attention call."""
    for x in (inputs.q, inputs.k, inputs.v):
        x.grad = None
    out = attend(inputs.q, inputs.k, inputs.v)
    out.backward(inputs.dout)
    gradients = (x.grad for x in (inputs.q, inputs.k, inputs.v))
    return out.detach(), *(grad for grad in gradients if grad is not None)


def run_cpu(inputs: Inputs, mask: TreeMask) -> Results:
    """The backend that is measured."""
    return _run(inputs, lambda q, k, v: attention(q, k, v, mask, backend="cpu"))


def _run_dense(inputs: Inputs, dense: Tensor) -> Results:
    return _run(
        inputs, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense[None, None])
    )


def _run_causal(inputs: Inputs) -> Results:
    return _run(inputs, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True))


def _npass_inputs(case: Case) -> list[Inputs]:
    """The samples' inputs; a token that several samples hold has its gradient in the first."""
    owner = torch.full((case.tree.num_tokens,), -1)
    for number in range(len(case.samples) - 1, -1, -1):
        owner[case.samples[number]] = number
    return [case.inputs.at(index, owner == i) for i, index in enumerate(case.samples)]


def _run_npass(samples: list[Inputs]) -> list[Results]:
    return [_run_causal(sample) for sample in samples]


def _packed(case: Case, samples: list[Inputs]) -> tuple[Inputs, TreeMask]:
    """The samples end to end in one row, each a tree of its own."""
    q, k, v, dout = (
        torch.cat([x.detach().transpose(1, 2) for x in column], 1).transpose(1, 2)
        for column in zip(*samples, strict=True)
    )
    chains = [PrefixTree.from_segments([Segment(index.numel())]) for index in case.samples]
    return _leaves(q, k, v, dout), compile_mask(chains)


def _check(case: Case, label: str, measurement: Measurement) -> None:
    """Compare with fp64, dense SDPA, N-pass and packed N-pass."""
    ours, dense = run_cpu(case.inputs, case.mask), _run_dense(case.inputs, case.dense)
    precise = _precise_first_head(case)
    samples = _npass_inputs(case)
    npass = _joined(case, _run_npass(samples))
    packed_row, packed_mask = _packed(case, samples)
    lengths = [index.numel() for index in case.samples]
    packed = run_cpu(packed_row, packed_mask)
    packed = _joined(
        case, list(zip(*(torch.split(x, lengths, dim=2) for x in packed), strict=True))
    )
    for i, name in enumerate(_NAMES):
        own_error = error(ours[i][0, :1], precise[i][None])
        dense_error = error(dense[i][0, :1], precise[i][None])
        where = f"{name}, {label}"
        measurement.check(f"{where}, against fp64", own_error, 2 * dense_error + _TOLERANCE)
        bound = 3 * dense_error + _TOLERANCE
        measurement.check(f"{where}, against dense SDPA", error(ours[i][0], dense[i][0]), bound)
        measurement.check(f"{where}, against N-pass", error(ours[i][0], npass[i][0]), bound)
        measurement.check(f"{where}, packed N-pass", error(packed[i][0], npass[i][0]), bound)


def _precise_first_head(case: Case) -> Results:
    q, k, v, dout = (x[0, 0].detach() for x in case.inputs)
    return attend_precisely(q, k, v, dout, case.dense)


def error(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of a head: norm(a - b) / norm(b) over tokens and width."""
    difference = torch.linalg.vector_norm(a.double() - b.double(), dim=(1, 2))
    return float((difference / torch.linalg.vector_norm(b.double(), dim=(1, 2))).max())


def _joined(case: Case, results: list[Results]) -> Results:
    """N-pass results as of one row: outputs are the same in every sample, gradients add up."""
    out, *gradients = (torch.zeros_like(case.inputs.q.detach()) for _ in range(4))
    for index, (sample_out, *sample_gradients) in zip(case.samples, results, strict=True):
        out[:, :, index] = sample_out
        for total, part in zip(gradients, sample_gradients, strict=True):
            total[:, :, index] += part
    return out, *gradients


def _measure(case: Case, label: str, measurement: Measurement) -> Row:
    samples = _npass_inputs(case)
    packed_row, packed_mask = _packed(case, samples)
    added = torch.zeros(case.dense.shape).masked_fill_(~case.dense, float("-inf"))
    tasks = {
        "cpu": Task(lambda: run_cpu(case.inputs, case.mask)),
        "dense": Task(lambda: _run_dense(case.inputs, case.dense)),
        "dense_fp32": Task(lambda: _run_dense(case.inputs, added), rounds=1),
        "causal": Task(lambda: _run_causal(case.inputs)),
        "npass": Task(lambda: _run_npass(samples)),
        "packed_npass": Task(lambda: run_cpu(packed_row, packed_mask)),
    }
    took = alternate(tasks, rounds=measurement.settings["rounds"], label=label)
    num_tokens, num_visible = case.tree.num_tokens, case.mask.num_visible
    num_causal = num_tokens * (num_tokens + 1) // 2
    rates = np.array(ratios(took["causal"], took["cpu"])) * num_visible / num_causal
    return {
        "num_tokens": num_tokens,
        "num_sample_tokens": case.tree.num_sample_tokens,
        "num_visible": num_visible,
        "num_visible_npass": packed_mask.num_visible,
        "elapsed_s": {name: spread(rounds) for name, rounds in took.items()},
        "speed_up": {
            name: spread(ratios(took[name], took["cpu"]))
            for name in ("dense", "dense_fp32", "npass", "packed_npass")
        },
        "rate_of_causal": spread(rates.tolist()),
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
    elapsed, compared = [], []
    for row in record["rows"]:
        took, faster = row["elapsed_s"], row["speed_up"]
        shape = (f"{row['num_turns']}", f"{row['num_tokens']:,}")
        names = ("cpu", "dense", "dense_fp32", "causal", "npass", "packed_npass")
        elapsed.append((*shape, *(seconds(took[name]) for name in names)))
        compared.append(
            (
                *shape,
                f"{row['num_visible']:,}",
                times(faster["dense"]),
                times(faster["dense_fp32"]),
                times(row["rate_of_causal"]),
                times(faster["npass"]),
                times(faster["packed_npass"]),
            )
        )
    return [
        Table(
            "Time: median (lowest-highest)",
            (
                "turns",
                "tokens",
                "cpu backend",
                "dense SDPA, bool",
                "dense SDPA, fp32",
                "causal SDPA",
                "N-pass",
                "packed N-pass",
            ),
            elapsed,
        ),
        Table(
            "The cpu backend: times faster than, and rate per visible pair of causal SDPA's",
            (
                "turns",
                "tokens",
                "visible pairs",
                "dense, bool",
                "dense, fp32",
                "rate",
                "N-pass",
                "packed N-pass",
            ),
            compared,
        ),
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
