"""Whole training steps of 1.7B and 8B shapes on a GPU: single-pass against N-pass."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import models
from benchmarks.conversations import Turn, random_samples
from benchmarks.environment import device
from benchmarks.models import Batch, gradient_differences, run_step, take_gradients
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.step import count_flops, count_tokens, counted_positions, make_step
from benchmarks.subprocess_calls import reason_of
from benchmarks.tables import Columns, Table, seconds, size, table, times
from benchmarks.timing import Task, alternate, ratios, scaled, spread
from flexmask import FlexmaskError, PrefixTree, patch, unpatch
from flexmask.backends.choice import record_choices

TITLE = "Whole training steps on a GPU"
ABOUT = """\
Forward, backward and update (SGD, learning rate 0) of models of the shapes of Qwen3, from a config
with random weights, in bf16 with activations checkpointed, on one conversation a step; each way
trains the same tokens. N-pass: the samples one by one through the unpatched model with sdpa,
gradients accumulated. Packed N-pass: all samples end to end in one row of the patched model, which
is plain varlen attention there. Single-pass: the patched model with "auto", and with each backend
by name. A way that cannot run is listed with its reason.

Checked first: loss and gradients against N-pass. Packed N-pass is the same mathematics, rounded in
another order, so single-pass may be twice as far from N-pass as that is, and a rounding of bf16
more. FLOPs are counted as in the case `step`; recomputed activations are counted for nobody."""

LIMIT_S = 430.0
_SHAPES = {  # Qwen3 models: hidden size, layers, query heads, width of the MLP
    "1.7B": (2048, 28, 16, 6144),
    "8B": (4096, 36, 32, 12288),
}
_CASES = (("1.7B", 16), ("8B", 8), ("8B", 16))  # and turns of a conversation
_TURN: Turn = (60, 300, 120)
_ROUNDS = 3
_SHARE = 0.9  # of the FLOP ratio to packed N-pass
_WAYS = {  # name: (what it is called, the backend of the patched model)
    "npass": ("N-pass", None),
    "packed_npass": ("packed N-pass", "auto"),
    "single_pass": ("single-pass", "auto"),
    "varlen": ("single-pass, varlen", "varlen"),
    "flex": ("single-pass, flex", "flex"),
    "triton": ("single-pass, triton", "triton"),
}
_FIRST = ("npass", "packed_npass")  # what the others are held to
_FAILURES = (RuntimeError, ImportError, ValueError, FlexmaskError)  # torch.OutOfMemoryError is one


class _Setting(NamedTuple):
    """A model and the batches of every way."""

    model: Qwen3ForCausalLM
    batches: dict[str, list[Batch]]
    pairs: dict[str, int]


def why_not(*, quick: bool) -> str | None:
    """The reason why this machine cannot run the case, or None."""
    if quick or device() == "cuda":
        return None
    return "needs a CUDA device; --quick tries it out on a CPU"


def measure(
    *, quick: bool, limit_s: float = LIMIT_S, previous: Record | None = None
) -> Iterator[Measurement]:
    """The measurement before the first model, and after each.

    Args:
        quick: a tiny model.
        limit_s: seconds after which no model is begun.
        previous: the record of a run that this one goes on with, or None.
    """
    rounds = 1 if quick else _ROUNDS
    measurement = Measurement(settings={"turn": _TURN, "rounds": rounds, "dtype": "bfloat16"})
    if previous is not None:
        measurement.go_on_with(previous)
        measurement.targets = [] if quick else _targets(measurement.rows)
    known = {row["name"] for row in measurement.rows}
    yield measurement
    started = time.perf_counter()
    for shape, turns in (("tiny", 2),) if quick else _CASES:
        name = f"{shape}, {turns} turns"
        if name in known:
            continue
        if time.perf_counter() - started > limit_s:
            break
        measurement.rows.append({"name": name} | _measure(shape, turns, rounds, measurement))
        if not quick:
            measurement.targets = _targets(measurement.rows)
        yield measurement


def _measure(shape: str, turns: int, rounds: int, measurement: Measurement) -> Row:
    """Check every way of a model, then time those that ran."""
    setting = _set_up(shape, turns)
    optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.0)
    found = _check(setting, f"{shape}, {turns} turns", measurement)
    ran = [name for name in _WAYS if name not in found["left_out"]]
    tasks = {
        name: Task(
            make_step(setting.model, optimizer, setting.batches[name]),
            partial(_prepare, setting.model, name),
        )
        for name in ran
    }
    took = alternate(tasks, rounds=rounds, label=f"{shape}, {turns} turns", device=device())
    flops = {
        name: count_flops(
            setting.model,
            num_tokens=count_tokens(setting.batches[name]),
            num_pairs=setting.pairs[name],
            num_head_positions=found["num_head_positions"][name],
        )
        for name in ran
    }
    row = {
        "num_parameters": setting.model.num_parameters(),
        "num_tokens": {name: count_tokens(setting.batches[name]) for name in ran},
        "flops": flops,
        "elapsed_s": {name: spread(values) for name, values in took.items()},
        **found,
        "speed_up": {},
        "share_of_flop_ratio": {},
    }
    for name in _FIRST:
        if name in took and "single_pass" in took:
            faster = spread(ratios(took[name], took["single_pass"]))
            row["speed_up"][name] = faster
            share = flops["single_pass"] / flops[name]
            row["share_of_flop_ratio"][name] = scaled(faster, share)
    return row


def _set_up(shape: str, turns: int) -> _Setting:
    """A model on the device, and its batches."""
    hidden, layers, heads, mlp = _SHAPES.get(shape, (32, 2, 2, 64))
    is_tiny = shape not in _SHAPES
    config = Qwen3Config(
        vocab_size=97 if is_tiny else 151_936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if is_tiny else 8,
        head_dim=16 if is_tiny else 128,
        intermediate_size=mlp,
        tie_word_embeddings=shape != "8B",
    )
    torch.manual_seed(0)
    with torch.device(device()):
        model = Qwen3ForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    turn = (4, 9, 5) if is_tiny else _TURN
    samples = random_samples([turn] * turns, vocab_size=config.vocab_size, seed=turns)
    single, packed = models.single_pass_batches([samples]), models.packed_npass_batches([samples])
    batches = dict.fromkeys(_WAYS, single)
    batches |= {"npass": models.npass_step_batches([samples]), "packed_npass": packed}
    npass_pairs = sum(len(s) * (len(s) + 1) // 2 for s in samples)
    pairs = dict.fromkeys(_WAYS, PrefixTree.from_turns([turn] * turns).num_pairs)
    pairs |= {"npass": npass_pairs, "packed_npass": npass_pairs}
    return _Setting(model, {n: [_moved(x) for x in each] for n, each in batches.items()}, pairs)


def _moved(batch: Batch) -> Batch:
    return {name: x.to(device()) for name, x in batch.items()}


def _check(setting: _Setting, label: str, measurement: Measurement) -> dict[str, Any]:
    """Compare every way with N-pass, which comes first, and then with packed N-pass."""
    losses: dict[str, float] = {}
    found: dict[str, Any] = {
        kind: {} for kind in ("num_head_positions", "peak_bytes", "backends", "left_out")
    }
    npass: dict[str, Tensor] = {}
    bounds = (0.0, 0.0)
    eps = torch.finfo(torch.bfloat16).eps
    for name in _WAYS:
        missing = [first for first in _FIRST if first in found["left_out"]]
        if missing:
            found["left_out"][name] = f"{_WAYS[missing[0]][0]} did not run, so there is no bound"
            continue
        _prepare(setting.model, name)
        try:
            with counted_positions(setting.model.lm_head) as counts, record_choices() as choices:
                losses[name] = run_step(setting.model, setting.batches[name])
        except _FAILURES as failure:
            found["left_out"][name] = reason_of(failure)
            setting.model.zero_grad(set_to_none=True)
            continue
        found["num_head_positions"][name] = sum(counts)
        found["backends"][name] = sorted({choice.name for choice in choices})
        if device() == "cuda":
            found["peak_bytes"][name] = torch.cuda.max_memory_allocated()
        gradients = take_gradients(setting.model)
        if name == "npass":
            npass = gradients
            continue
        distance = abs(losses[name] - losses["npass"]) / abs(losses["npass"])
        largest = gradient_differences(gradients, npass)["norm"]
        del gradients
        if name == "packed_npass":
            bounds = 2 * distance + eps, 2 * largest + eps
            continue
        measurement.check(f"loss, {name} against N-pass, {label}", distance, bounds[0])
        measurement.check(f"gradients, {name} against N-pass, {label}", largest, bounds[1])
    return found


def _prepare(model: Qwen3ForCausalLM, name: str) -> tuple[()]:
    """Patch the model with a way's backend, or unpatch it, outside the timed part."""
    unpatch(model)
    backend = _WAYS[name][1]
    if backend is not None:
        patch(model, backend=backend)
    if device() == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return ()


def _targets(rows: list[Row]) -> list[Target]:
    return [
        Target(
            f"speed-up over packed N-pass by FLOP ratio, {row['name']}",
            _SHARE,
            row["share_of_flop_ratio"]["packed_npass"]["median"],
        )
        for row in rows
        if "packed_npass" in row["share_of_flop_ratio"]
    ]


def tables(record: Record) -> list[Table]:
    rows = record["rows"]
    against: dict[str, Callable[[Row], str]] = {"model": lambda row: row["name"]}
    for name in _FIRST:
        against[f"faster than {_WAYS[name][0]}"] = partial(_ratio, "speed_up", name)
        share = partial(_ratio, "share_of_flop_ratio", name)
        against[f"by FLOP ratio, {_WAYS[name][0]}"] = share
    ways = [
        {"name": f"{row['name']}, {_WAYS[name][0]}", "way": name, "row": row}
        for row in rows
        for name in _WAYS
    ]
    each: Columns = {
        "model, way": lambda way: way["name"],
        "tokens": lambda way: _number(way["row"]["num_tokens"].get(way["way"])),
        "TFLOP": lambda way: _number(way["row"]["flops"].get(way["way"]), 1e12),
        "step": lambda way: seconds(way["row"]["elapsed_s"].get(way["way"])),
        "peak memory": lambda way: size(way["row"]["peak_bytes"].get(way["way"])),
        "backends": lambda way: ", ".join(way["row"]["backends"].get(way["way"], [])) or "-",
        "left out": lambda way: way["row"]["left_out"].get(way["way"], "-"),
    }
    return [
        table("Single-pass against N-pass: median (lowest-highest)", rows, against),
        table("Each way", ways, each),
    ]


def _ratio(kind: str, name: str, row: Row) -> str:
    return times(row[kind].get(name))


def _number(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"
