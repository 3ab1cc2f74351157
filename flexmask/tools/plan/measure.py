"""Real training steps on a few conversations, beside what the cost model says of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from transformers import PreTrainedModel

from flexmask.errors import pluralize
from flexmask.model import patch, unpatch
from flexmask.model.cost import CostModel
from flexmask.model.npass import npass_batches
from flexmask.model.structure import text_config
from flexmask.model.work import Work, npass_work, single_pass_work
from flexmask.packing.rows import PackedRow
from flexmask.tools.expect import expected
from flexmask.tools.plan.estimate import Estimate
from flexmask.tools.plan.memory import saved_bytes
from flexmask.tree.build import build_tree
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample

WAYS = ("npass", "packed_npass", "single_pass")
_ROUNDS = 3
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """Forward and backward of a few conversations in three ways, on this machine.

    Attributes:
        device: where, in words.
        conversations, npass_tokens, single_pass_tokens: what was run.
        rounds: how many the medians are of; where it is the only one, it warmed up too.
        was_stopped: by the user, before all rounds were done.
        seconds: median by way.
        measured_speed_up: single-pass over each other way, median of the rounds.
        speed_up_range: the lowest and the highest of the rounds.
        predicted_speed_up: the same by the cost model, for the same conversations.
        saved_bytes: by way, what autograd kept for the largest row.
        predicted_saved_bytes: the same from shapes alone, None where they do not tell.
    """

    device: str
    conversations: int
    npass_tokens: int
    single_pass_tokens: int
    rounds: int
    was_stopped: bool
    seconds: dict[str, float]
    measured_speed_up: dict[str, float]
    speed_up_range: dict[str, tuple[float, float]]
    predicted_speed_up: dict[str, float]
    saved_bytes: dict[str, int]
    predicted_saved_bytes: dict[str, int | None]


def measure_steps(
    model: PreTrainedModel,
    conversations: Sequence[Sequence[Sample]],
    *,
    saved_per_token: float | None,
    limit_s: float = math.inf,
    progress: Callable[[Any], Any] = iter,
) -> Measured | None:
    """Time N-pass, packed N-pass and single-pass in turns; None where no round was done in time.

    Args:
        model: on the device where to run; it is left unpatched.
        conversations: samples of each, with tokens of the model's vocabulary; a step trains on all
            of them, one conversation a row.
        saved_per_token: predicted bytes that autograd keeps for a token, or None.
        limit_s: seconds after which no other batch is begun; finished rounds are kept then, and
            where the user stops it.
        progress: wraps the rounds, such as `tqdm.tqdm`.

    Raises:
        UnsupportedModelError: the model cannot be patched.
    """
    model.train()
    cost = CostModel.of(model)
    batches = {way: list(_batches(conversations, way, model.device)) for way in WAYS}
    largest = {way: max(batches[way], key=_num_tokens) for way in WAYS}
    kept: dict[str, int] = {}
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    stop_s = time.monotonic() + limit_s
    was_stopped = False
    try:
        for way in WAYS:
            _prepare(model, way)
            kept[way] = saved_bytes(model, partial(model, **largest[way]))
            _check_time(stop_s)
        for _ in progress(range(_ROUNDS + 1)):
            for way in WAYS:
                _prepare(model, way)
                took[way].append(_time(model, batches[way], stop_s))
    except KeyboardInterrupt:
        was_stopped = True
    except TimeoutError:
        pass
    unpatch(model)
    done = min(map(len, took.values()))
    if not done:
        if was_stopped:
            raise KeyboardInterrupt("before a round was measured")
        return None
    first = 1 if done > 1 else 0  # which warms up
    took = {way: seconds[first:done] for way, seconds in took.items()}
    others = WAYS[:-1]
    lengths = [len(sample) for samples in conversations for sample in samples]
    before = npass_work(lengths, cost.windows)
    trees = (single_pass_work(build_tree(samples), cost.windows) for samples in conversations)
    after = reduce(Work.plus, trees)
    ratios = {
        way: [a / b for a, b in zip(took[way], took["single_pass"], strict=True)] for way in others
    }
    return Measured(
        device=_name(model.device),
        conversations=len(conversations),
        npass_tokens=before.num_tokens,
        single_pass_tokens=after.num_tokens,
        rounds=done - first,
        was_stopped=was_stopped,
        seconds={way: statistics.median(took[way]) for way in WAYS},
        measured_speed_up={way: statistics.median(ratios[way]) for way in others},
        speed_up_range={way: (min(ratios[way]), max(ratios[way])) for way in others},
        predicted_speed_up={way: cost.speed_up(before, after) for way in others},
        saved_bytes=kept,
        predicted_saved_bytes={
            way: None if saved_per_token is None else round(saved_per_token * _num_tokens(batch))
            for way, batch in largest.items()
        },
    )


def expected_steps(
    model: PreTrainedModel, conversations: Sequence[Sequence[Sample]], guess: Estimate
) -> str:
    """The memory and time of `measure_steps`, in words."""
    cost = CostModel.of(model)
    lengths = [[len(sample) for sample in samples] for samples in conversations]
    npass = sum(cost.flops(npass_work(one, cost.windows)) for one in lengths)
    trees = [single_pass_work(build_tree(samples), cost.windows) for samples in conversations]
    num_bytes = None
    if guess.saved_bytes_per_token is not None:
        per_token = guess.saved_bytes_per_token
        per_token += text_config(model).vocab_size * (model.dtype.itemsize + 4)
        gradients = guess.state_bytes / 4  # as large as the weights, which are there
        num_bytes = gradients + per_token * max(map(sum, lengths))
    flops = (_ROUNDS + 1) * (2 * npass + sum(map(cost.flops, trees)))
    return expected({model.dtype: flops}, num_bytes, model.device)


def _batches(
    conversations: Sequence[Sequence[Sample]], way: str, device: torch.device
) -> Iterator[Batch]:
    """Yield the batches of a step, on a device."""
    for samples in conversations:
        if way == "npass":
            batches = list(npass_batches(samples))
        else:
            merged = [[sample] for sample in samples] if way == "packed_npass" else [samples]
            batches = [PackedRow.from_trees(list(map(build_tree, merged))).to_batch()]
        for batch in batches:
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def _prepare(model: PreTrainedModel, way: str) -> None:
    if way == "npass":
        unpatch(model)
    else:
        patch(model)


def _num_tokens(batch: Batch) -> int:
    return batch["input_ids"].numel()


def _check_time(stop_s: float) -> None:
    """Raise TimeoutError after a moment of the monotonic clock."""
    if time.monotonic() > stop_s:
        raise TimeoutError


def _time(model: PreTrainedModel, batches: list[Batch], stop_s: float) -> float:
    gc.collect()
    num_trained = sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in batches)
    _wait(model.device)
    started = time.perf_counter()
    for batch in batches:
        _check_time(stop_s)
        model(**batch, num_items_in_batch=num_trained).loss.backward()
    _wait(model.device)
    elapsed_s = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return elapsed_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {pluralize(torch.get_num_threads(), 'thread')}"
