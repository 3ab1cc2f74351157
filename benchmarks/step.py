"""Whole training steps of a 100M-parameter llama: single-pass against N-pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from benchmarks import models
from benchmarks.conversations import Turn, random_samples
from benchmarks.models import TINY, Batch, gradient_differences, run_step, take_gradients
from benchmarks.plots import draw_bars
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Columns, Table, seconds, table, times
from benchmarks.timing import Task, compare, scaled
from flexmask import PrefixTree, Sample, patch, unpatch

TITLE = "Whole training steps"
ABOUT = """\
Forward, backward and AdamW update of a llama of about 100M parameters from a config, in fp32, on
one conversation a step; each way trains the same tokens. N-pass: the samples one by one through the
unpatched model with sdpa, gradients accumulated. Single-pass: the patched model, `cpu` backend.
Packed N-pass: all samples end to end in one row of the patched model. Dense mask: the single-pass
row through the unpatched model, with a 4-D mask in fp32. The learning rate is 0, so that every
step starts from the same weights and does the same work. Batches are made beforehand.

FLOPs: 6 for each parameter of a linear layer and each token, 12 for each visible pair and each
unit of width of the query heads (two products forward, four backward), 6 for each parameter of the
head and each position that it is computed for (counted by a hook). Embeddings, norms, softmax, loss
and update count nothing. Checked before: loss and gradients of single-pass against N-pass."""

_LLAMA_100M = LlamaConfig(
    vocab_size=16_384,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    intermediate_size=2048,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
_TURN: Turn = (24, 80, 32)
_NUM_TURNS = (6, 16)
_ROUNDS = 3
_PATCHED = ("single_pass", "packed_npass")
_LOSS_BOUND, _GRADIENT_BOUND = 1e-6, 1e-5  # relative, fp32
_FLOP_SHARE = 0.95  # of the FLOP ratio, what the speed-up must reach


def measure(*, quick: bool) -> Measurement:
    config = TINY if quick else _LLAMA_100M
    turn, numbers = ((4, 9, 5), (2, 3)) if quick else (_TURN, _NUM_TURNS)
    model = models.random_llama(config)
    measurement = Measurement(
        settings={
            **models.describe_model(model),
            "vocab_size": config.vocab_size,
            "dtype": "float32",
            "turn": turn,
            "rounds": 2 if quick else _ROUNDS,
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for number in numbers:
        samples = random_samples([turn] * number, vocab_size=config.vocab_size, seed=number)
        row = _measure(model, optimizer, samples, f"{number} turns", measurement)
        row["num_visible_pairs"] = {
            "single_pass": PrefixTree.from_turns([turn] * number).num_pairs,
            "npass": sum(len(s) * (len(s) + 1) // 2 for s in samples),
        }
        measurement.rows.append({"num_turns": number} | _count(model, row))
    if not quick:
        measurement.targets = [
            Target(
                f"speed-up over N-pass by FLOP ratio, {row['num_turns']} turns",
                _FLOP_SHARE,
                row["share_of_flop_ratio"]["median"],
            )
            for row in measurement.rows
        ]
    return measurement


def _measure(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    label: str,
    measurement: Measurement,
) -> Row:
    """Check, then time; the row has no FLOPs yet."""
    batches = {
        "single_pass": models.single_pass_batches([samples]),
        "npass": models.npass_step_batches([samples]),
        "packed_npass": models.packed_npass_batches([samples]),
        "dense": models.dense_batches([samples]),
    }
    head_rows = _check(model, batches, label, measurement)
    make_step(
        model, optimizer, batches["npass"][:1]
    )()  # the first update makes the optimizer's state

    tasks = {
        name: Task(
            make_step(model, optimizer, batches[name]),
            partial(_prepare, model, is_patched=name in _PATCHED),
            None if name in ("npass", "single_pass") else 1,
        )
        for name in ("npass", "single_pass", "dense", "packed_npass")
    }
    found = compare(tasks, "single_pass", rounds=measurement.settings["rounds"], label=label)
    unpatch(model)
    return {
        "num_tokens": {name: count_tokens(batch) for name, batch in batches.items()},
        "num_head_positions": head_rows,
        "num_trained": models.count_trained(batches["single_pass"]),
        **found,
    }


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]
) -> Callable[[], None]:
    """A function that runs a whole step: gradients of all batches, and the update."""

    def run() -> None:
        run_step(model, batches)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _prepare(model: nn.Module, *, is_patched: bool) -> tuple[()]:
    """Patch or unpatch the model, outside the timed part."""
    if is_patched:
        patch(model, backend="cpu")
    else:
        unpatch(model)
    return ()


def _check(
    model: LlamaForCausalLM,
    batches: dict[str, list[Batch]],
    label: str,
    measurement: Measurement,
) -> dict[str, int]:
    """Compare every way with N-pass; returns how many positions the head was computed for."""
    losses, gradients, head_rows = {}, {}, {}
    for name in ("npass", "single_pass", "packed_npass", "dense"):
        _prepare(model, is_patched=name in _PATCHED)
        with counted_positions(model.lm_head) as counts:
            losses[name] = run_step(model, batches[name])
        head_rows[name] = sum(counts)
        gradients[name] = take_gradients(model)
        if name == "npass":
            continue
        where = f"{name} against N-pass, {label}"
        difference = abs(losses[name] - losses["npass"]) / abs(losses["npass"])
        measurement.check(f"loss, {where}", difference, _LOSS_BOUND)
        differences = gradient_differences(gradients.pop(name), gradients["npass"])
        for kind in ("largest", "norm"):
            at = differences[f"{kind}_at"]
            measurement.check(
                f"gradients by {kind}, {where}, at {at}", differences[kind], _GRADIENT_BOUND
            )
    return head_rows


@contextmanager
def counted_positions(head: nn.Module) -> Iterator[list[int]]:
    """A block whose list receives the number of positions of each call of `head`."""
    counts: list[int] = []
    hook = head.register_forward_hook(
        lambda module, inputs, output: counts.append(output[..., 0].numel())
    )
    try:
        yield counts
    finally:
        hook.remove()


def count_tokens(batches: list[Batch]) -> int:
    """Tokens that the model runs on."""
    return sum(batch["input_ids"].numel() for batch in batches)


def _count(model: LlamaForCausalLM, row: Row) -> Row:
    """The row with FLOPs and what the speed-up is of their ratio."""
    flops = {
        name: count_flops(
            model,
            num_tokens=row["num_tokens"][name],
            num_pairs=row["num_visible_pairs"][name],
            num_head_positions=row["num_head_positions"][name],
        )
        for name in ("single_pass", "npass")
    }
    ratio = flops["npass"] / flops["single_pass"]
    share = scaled(row["speed_up"]["npass"], 1 / ratio)
    return row | {"flops": flops, "flop_ratio": ratio, "share_of_flop_ratio": share}


def count_flops(
    model: LlamaForCausalLM | Qwen3ForCausalLM,
    *,
    num_tokens: int,
    num_pairs: int,
    num_head_positions: int,
) -> int:
    """FLOPs of a training step, forward and backward, as ABOUT says."""
    config = model.config
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    width = config.hidden_size * config.num_hidden_layers
    head = model.lm_head.weight.numel()
    return 6 * linear * num_tokens + 12 * width * num_pairs + 6 * head * num_head_positions


def tables(record: Record) -> list[Table]:
    against_npass: Columns = {
        "turns": lambda row: f"{row['num_turns']}",
        "tokens, single-pass": lambda row: f"{row['num_tokens']['single_pass']:,}",
        "tokens, N-pass": lambda row: f"{row['num_tokens']['npass']:,}",
        "single-pass": lambda row: seconds(row["elapsed_s"]["single_pass"]),
        "N-pass": lambda row: seconds(row["elapsed_s"]["npass"]),
        "speed-up": lambda row: times(row["speed_up"]["npass"]),
        "FLOP ratio": lambda row: f"{row['flop_ratio']:.2f}",
        "speed-up / FLOP ratio": lambda row: times(row["share_of_flop_ratio"]),
    }
    against_others: Columns = {
        "turns": lambda row: f"{row['num_turns']}",
        "packed N-pass": lambda row: seconds(row["elapsed_s"]["packed_npass"]),
        "faster than packed": lambda row: times(row["speed_up"]["packed_npass"]),
        "dense mask": lambda row: seconds(row["elapsed_s"]["dense"]),
        "faster than dense": lambda row: times(row["speed_up"]["dense"]),
    }
    rows = record["rows"]
    return [
        table("Single-pass against N-pass: median (lowest-highest)", rows, against_npass),
        table("Single-pass against packed N-pass and a dense mask", rows, against_others),
    ]


def draw(record: Record, path: Path) -> str:
    rows = record["rows"]
    draw_bars(
        [f"{row['num_turns']} turns" for row in rows],
        {
            "measured": [row["speed_up"]["npass"]["median"] for row in rows],
            "FLOP ratio": [row["flop_ratio"] for row in rows],
        },
        path,
        x_label="conversation",
        y_label="N-pass time / single-pass time",
    )
    return "Speed-up of whole training steps over N-pass, and the ratio of their FLOPs"
