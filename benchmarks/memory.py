"""Peak memory of training against the length of the row: `cpu` backend and dense mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conversations import NUM_TURNS, TURN, random_samples, scaled_turns
from benchmarks.peak import Peak, measure_peak
from benchmarks.plots import draw_curves
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Columns, Table, size, table

TITLE = "Peak memory"
ABOUT = """\
One 16-turn conversation of L tokens as one row, fp32. Attention: forward and backward of 8 heads of
64, mask included. Step: forward and backward of a llama with 4 layers of width 256 and a vocabulary
of 1,024, batch and mask included. Each figure is the most that a fresh process holds beyond its
inputs, weights and imports; allocators keep what they are given, so repeated runs differ by a few
percent. The loss (or the sum of the outputs) and the size of the gradients must agree between both
methods wherever both ran. Growth is the exponent between the last two lengths: 1 is linear, 2
quadratic."""

_KINDS = ("attention", "step")
_LENGTHS = {"cpu": (2048, 4096, 8192, 16_384, 32_768), "dense": (2048, 4096, 8192, 16_384)}
_QUICK_LENGTHS = {"cpu": (256,), "dense": (256,)}
_AGREEMENT = 1e-4  # relative; wrong masks are off by far more
_MOST_GROWTH = 1.15
_WARM_UP = NUM_TURNS * 16  # tokens


def measure(*, quick: bool) -> Measurement:
    lengths = _QUICK_LENGTHS if quick else _LENGTHS
    kinds = ("attention",) if quick else _KINDS
    measurement = Measurement(settings={"turns": NUM_TURNS, "turn": TURN, "dtype": "float32"})
    for kind in kinds:
        for num_tokens in lengths["cpu"]:
            row: Row = {"kind": kind, "num_tokens": num_tokens, "peak_bytes": {}}
            peaks: dict[str, Peak] = {}
            for method in ("cpu", "dense"):
                if num_tokens in lengths[method]:
                    peaks[method] = measure_peak(_PREPARE[kind], method, num_tokens)
                    row["peak_bytes"][method] = peaks[method].num_bytes
            if len(peaks) == 2:
                ours, theirs = np.array(peaks["cpu"].value), np.array(peaks["dense"].value)
                difference = float((np.abs(ours - theirs) / np.abs(theirs)).max())
                measurement.check(
                    f"{kind}, {num_tokens:,} tokens, cpu against dense", difference, _AGREEMENT
                )
            measurement.rows.append(row)
    if not quick:
        measurement.targets = [t for kind in kinds for t in _targets(measurement.rows, kind)]
    return measurement


def prepare_attention(method: str, num_tokens: int) -> Callable[[], list[float]]:
    """Attention alone; the function returns sizes of the output and the gradients."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from flexmask import PrefixTree, attention, compile_mask
    from flexmask.tree.oracle import ancestry

    def draw(length: int) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        shape = (1, length, 8, 64)
        q, k, v, dout = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4))
        return [*(x.requires_grad_() for x in (q, k, v)), dout]

    def run(q: Any, k: Any, v: Any, dout: Any) -> list[float]:
        tree = PrefixTree.from_turns(scaled_turns(q.shape[2]))
        if method == "cpu":
            out = attention(q, k, v, compile_mask(tree), backend="cpu")
        else:
            mask = torch.from_numpy(ancestry(tree))[None, None]
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out.backward(dout)
        return [float(torch.linalg.vector_norm(x.detach())) for x in (out, q.grad, k.grad, v.grad)]

    run(*draw(_WARM_UP))
    inputs = draw(num_tokens)
    return lambda: run(*inputs)


def prepare_step(method: str, num_tokens: int) -> Callable[[], list[float]]:
    """Forward and backward of a small llama; returns the loss and the size of the gradients."""
    import torch

    from benchmarks import models
    from flexmask import Sample, patch

    model = models.random_llama(models.SMALL)
    if method == "cpu":
        patch(model, backend="cpu")

    make_batches = models.single_pass_batches if method == "cpu" else models.dense_batches

    def draw(length: int) -> list[Sample]:
        vocab_size = models.SMALL.vocab_size
        return random_samples(scaled_turns(length), vocab_size=vocab_size, seed=length)

    def run(samples: list[Sample]) -> list[float]:
        loss = models.run_step(model, make_batches([samples]))
        gradients = models.take_gradients(model)
        return [loss, *(float(torch.linalg.vector_norm(x)) for x in gradients.values())]

    run(draw(_WARM_UP))
    samples = draw(num_tokens)
    return lambda: run(samples)


_PREPARE = {"attention": prepare_attention, "step": prepare_step}


def _targets(rows: list[Row], kind: str) -> list[Target]:
    chosen = [row["peak_bytes"] for row in rows if row["kind"] == kind]
    ratios = [peaks["dense"] / peaks["cpu"] for peaks in chosen if "dense" in peaks]
    return [
        Target(f"{kind}, dense peak / cpu peak, smallest of all lengths", 1.0, min(ratios)),
        Target(f"{kind}, growth of the cpu peak", _MOST_GROWTH, growth(rows, kind, "cpu"), True),
    ]


def growth(rows: list[Row], kind: str, method: str) -> float:
    """The exponent of the peak's growth between the last two lengths; NaN if there are not two."""
    measured = [row for row in rows if row["kind"] == kind and method in row["peak_bytes"]][-2:]
    if len(measured) < 2:
        return float("nan")
    tokens = [row["num_tokens"] for row in measured]
    peaks = [row["peak_bytes"][method] for row in measured]
    return float(np.log(peaks[1] / peaks[0]) / np.log(tokens[1] / tokens[0]))


def tables(record: Record) -> list[Table]:
    def per_token(row: Row) -> str:
        return f"{row['peak_bytes']['cpu'] / row['num_tokens'] / 1024:.1f} KiB"

    def ratio(row: Row) -> str:
        peaks = row["peak_bytes"]
        return f"{peaks['dense'] / peaks['cpu']:.1f}" if "dense" in peaks else "-"

    columns: Columns = {
        "tokens": lambda row: f"{row['num_tokens']:,}",
        "cpu backend": lambda row: size(row["peak_bytes"]["cpu"]),
        "a token": per_token,
        "dense mask": lambda row: size(row["peak_bytes"].get("dense")),
        "times as much": ratio,
    }
    found = []
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["kind"] == kind]
        peaks = table(f"Peak memory, {kind}", rows, columns)
        ours, dense = (f"{growth(record['rows'], kind, name):.2f}" for name in ("cpu", "dense"))
        found.append(replace(peaks, lines=[*peaks.lines, ("growth", ours, "-", dense, "-")]))
    return found


def draw(record: Record, path: Path) -> str:
    labels = {
        "attention": "attention, 8 heads of 64",
        "step": "step of a small llama",
    }
    methods = {"cpu": "cpu backend", "dense": "dense mask"}
    curves = {}
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        for method, name in methods.items():
            rows = [r for r in record["rows"] if r["kind"] == kind and method in r["peak_bytes"]]
            curves[f"{name}, {labels[kind]}"] = (
                [row["num_tokens"] for row in rows],
                [row["peak_bytes"][method] / 2**20 for row in rows],
            )
    draw_curves(curves, path, x_label="tokens in the row", y_label="peak memory, MiB")
    return "Peak memory against the length of the row, both axes logarithmic"
