"""Loss and gradients of the single pass against N-pass, through whole models."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from benchmarks import models
from benchmarks.conversations import Turn, random_samples
from benchmarks.models import SMALL, TINY, gradient_differences, run_step, take_gradients
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Columns, Table, table
from flexmask import Sample, patch, unpatch
from flexmask.model.adapter import wrong_masks

TITLE = "Exactness"
ABOUT = """\
One optimizer step's loss and gradients, single-pass against N-pass through stock sdpa, from the
same random weights. Gradient differences are relative, of the parameter where they are largest:
largest difference by largest entry, and norm by norm. In fp64, norms, rotary embedding, softmax and
loss are fp64 too, which stock transformers computes in fp32. Two columns put the figures into
proportion: what a wrong mask (plain causal) would make of the loss, and how far N-pass itself in
fp32 is from N-pass in fp64."""

_SHAPES: dict[str, list[Turn]] = {
    "6 turns of 24/80/32": [(24, 80, 32)] * 6,
    "16 turns of 24/80/32": [(24, 80, 32)] * 16,
    "7 turns, some without reasoning": [
        (90, 0, 60),
        (20, 150, 40),
        (35, 1, 70),
        (12, 0, 25),
        (40, 200, 90),
        (5, 60, 1),
        (30, 90, 50),
    ],
}
_QUICK_SHAPES: dict[str, list[Turn]] = {"3 turns": [(4, 9, 5), (3, 0, 6), (2, 7, 4)]}
_BOUNDS = {"float64": (1e-10, 1e-10), "float32": (1e-6, 1e-5)}  # of the loss and of the gradients
_RUNS = (("float64", "reference"), ("float64", "cpu"), ("float32", "cpu"), ("float32", "reference"))


def measure(*, quick: bool) -> Measurement:
    config = TINY if quick else SMALL
    model = models.random_llama(config)
    measurement = Measurement(
        settings={
            **models.describe_model(model),
            "heads": [config.num_attention_heads, config.num_key_value_heads],
        }
    )
    precise = models.in_fp64(models.random_llama(config))
    for shape, turns in (_QUICK_SHAPES if quick else _SHAPES).items():
        samples = random_samples(turns, vocab_size=config.vocab_size, seed=1)
        oracle = _npass(precise, samples)
        for dtype, backend in _RUNS:
            chosen = precise if dtype == "float64" else model
            row: Row = {"shape": shape, "dtype": dtype, "backend": backend}
            row |= _compare(chosen, samples, backend)
            if dtype == "float32":
                row["npass_error"] = gradient_differences(_npass(model, samples)[1], oracle[1])
            measurement.rows.append(row)
            _check(row, measurement)
    if not quick:
        measurement.targets = _targets(measurement.rows)
    return measurement


def _npass(model: LlamaForCausalLM, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = run_step(model, models.npass_step_batches([samples]))
    return loss, take_gradients(model)


def _compare(model: LlamaForCausalLM, samples: list[Sample], backend: str) -> Row:
    expected, theirs = _npass(model, samples)
    (batch,) = models.single_pass_batches([samples])
    patch(model, backend=backend)
    try:
        loss = run_step(model, [batch])
        ours = take_gradients(model)
        batch["subtree_end"] = torch.full_like(batch["subtree_end"], batch["subtree_end"].shape[1])
        with torch.no_grad(), wrong_masks(model):
            num_trained = models.count_trained([batch])
            wrong = float(models.loss_of(model, batch, num_trained))
    finally:
        unpatch(model)
    return {
        "num_tokens": batch["input_ids"].shape[1],
        "num_sample_tokens": sum(len(sample) for sample in samples),
        "loss": expected,
        "loss_difference": abs(loss - expected) / abs(expected),
        "gradients": gradient_differences(ours, theirs),
        "wrong_mask_loss_difference": abs(wrong - expected) / abs(expected),
    }


def _check(row: Row, measurement: Measurement) -> None:
    loss_bound, gradient_bound = _BOUNDS[row["dtype"]]
    where = f"{row['shape']}, {row['dtype']}, {row['backend']}"
    gradients = row["gradients"]
    measurement.check(f"loss, {where}", row["loss_difference"], loss_bound)
    for kind in ("largest", "norm"):
        name = f"gradients by {kind}, {where}, at {gradients[f'{kind}_at']}"
        measurement.check(name, gradients[kind], gradient_bound)


def _targets(rows: list[Row]) -> list[Target]:
    targets = []
    for dtype, backend in (("float64", "reference"), ("float32", "cpu")):
        chosen = [row for row in rows if (row["dtype"], row["backend"]) == (dtype, backend)]
        loss_bound, gradient_bound = _BOUNDS[dtype]
        loss = max(row["loss_difference"] for row in chosen)
        gradients = max(
            max(row["gradients"]["largest"], row["gradients"]["norm"]) for row in chosen
        )
        where = f"{dtype}, {backend} backend"
        targets.append(Target(f"loss, {where}, relative", loss_bound, loss, is_most=True))
        targets.append(
            Target(f"gradients, {where}, relative", gradient_bound, gradients, is_most=True)
        )
    return targets


def tables(record: Record) -> list[Table]:
    def own_error(row: Row) -> str:
        return f"{row['npass_error']['largest']:.1e}" if "npass_error" in row else "-"

    columns: Columns = {
        "conversation": lambda row: row["shape"],
        "dtype, backend": lambda row: f"{row['dtype']}, {row['backend']}",
        "tokens, single / N": lambda row: f"{row['num_tokens']:,} / {row['num_sample_tokens']:,}",
        "loss": lambda row: f"{row['loss_difference']:.1e}",
        "gradients, largest": lambda row: f"{row['gradients']['largest']:.1e}",
        "gradients, norm": lambda row: f"{row['gradients']['norm']:.1e}",
        "loss, wrong mask": lambda row: f"{row['wrong_mask_loss_difference']:.1e}",
        "N-pass fp32 against fp64": own_error,
    }
    heading = "Relative difference of the single pass from N-pass"
    return [table(heading, record["rows"], columns)]
