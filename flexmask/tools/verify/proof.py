"""Proof, on a user's own model, data and backend, that the single pass equals N-pass.

What is compared, and with which bound: `flexmask.tools.verify.differences`. Whatever stands in the
way of the comparison is a finding too, so a verification ends with a report, not with a traceback.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from flexmask.errors import FlexmaskError
from flexmask.model import patch, unpatch
from flexmask.model.experts import without_auxiliary_loss
from flexmask.model.npass import npass_batches
from flexmask.model.structure import active_dropouts, text_config
from flexmask.packing.rows import PackedRow
from flexmask.tools.verify.differences import (
    Difference,
    TurnNumbers,
    group_norms,
    relative_difference,
)
from flexmask.tools.verify.parameter_groups import ParameterGroup, parameter_groups
from flexmask.tools.verify.report import Control, Finding, StepNumbers, VerifyReport
from flexmask.tools.verify.turn_gradients import (
    npass_losses,
    npass_turn,
    row_logprobs,
    single_pass_turn,
    step_result,
)
from flexmask.tree.sample import Sample
from flexmask.tree.tree import build_tree

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
Progress = Callable[[Iterable[Any], int], Iterable[Any]]
# What a model raises that cannot take a batch; out of memory is among them.
_RUN_ERRORS = (FlexmaskError, RuntimeError, IndexError)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to check: its samples, its packed row, and where it came from."""

    samples: Sequence[Sample]
    row: PackedRow
    where: str | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], where: str | None = None) -> Chat:
        """The conversation with these samples."""
        return cls(samples, PackedRow.from_trees([build_tree(samples)]), where)


def verify_model(
    model: PreTrainedModel,
    chats: Sequence[Chat],
    *,
    backend: str = "auto",
    progress: Progress = lambda items, total: items,
) -> VerifyReport:
    """The findings and figures for an unpatched model; it is left unpatched, in training mode.

    Args:
        model: in float32, bfloat16 or float16.
        chats: the conversations, at least one.
        backend: as in `patch`.
        progress: wraps the turns of each stage and their number, such as `tqdm.tqdm`.
    """
    report = VerifyReport(dtype=model.dtype)
    with without_auxiliary_loss(text_config(model)) as had_one:
        _verify(report, model, chats, backend, progress)
    if had_one:
        text = "one sample has another than a batch of all, so all was compared without it"
        report.add(Finding("auxiliary loss", True, text))
    return report


def _verify(
    report: VerifyReport,
    model: PreTrainedModel,
    chats: Sequence[Chat],
    backend: str,
    progress: Progress,
) -> None:
    """Add all findings and figures to the report, up to one that makes the next ones useless."""
    model.train()
    wider = _widened(model)
    try:
        report.add(_check_noise(model, wider, chats[0].samples[0]))
    except _RUN_ERRORS as error:
        report.fail("N-pass", f"the model cannot run a sample: {_one_line(error)}")
        return
    try:
        with _patched(model, backend):
            pass
    except FlexmaskError as error:
        report.fail("patch", str(error))
        return
    report.add(Finding("patch", True, f"model_type {text_config(model).model_type!r} is verified"))
    if not report.is_proved:
        return
    try:
        _compare_turns(report, model, wider, chats, backend, progress)
        _compare_step(report, model, wider, chats, backend)
    except _RUN_ERRORS as error:
        text = _one_line(error)
        report.fail("mask" if "ignored the mask" in text else "run", text)
        return
    report.judge()


def _widened(model: PreTrainedModel) -> nn.Module:
    """A copy of the model in a wider type, without dropout: where rounding is measured from."""
    wider = copy.deepcopy(model)
    if any(".experts" in name for name, _ in wider.named_modules()):
        wider.set_experts_implementation("eager")  # grouped kernels take no float64
    if "flash" in (text_config(wider)._attn_implementation or ""):
        wider.set_attn_implementation("sdpa")  # flash kernels take 16 bits only
    copied: nn.Module = wider
    return copied.to(WIDER[model.dtype]).eval()


def _check_noise(model: PreTrainedModel, wider: nn.Module, sample: Sample) -> Finding:
    """Whether two runs of one sample, in training mode, differ by no more than rounding."""
    with torch.no_grad():
        model.eval()
        exact = npass_losses(wider, sample).double()
        error = float((npass_losses(model, sample).double() - exact).abs().mean())
        model.train()
        first, second = (npass_losses(model, sample).double() for _ in range(2))
    size = float(exact.abs().mean())
    noise = float((first - second).abs().mean())
    difference = relative_difference(noise, error, size, model.dtype)
    if difference.is_within:
        text = "in training mode, N-pass gives the same losses twice"
        return Finding("dropout", True, text, difference)
    names = [f"{name} (p = {p})" for name, p in active_dropouts(model)]
    rates = [
        f"{name} = {value}"
        for name, value in vars(text_config(model)).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    ]
    found = ", ".join([*rates, *names][:4]) or "no dropout by that name"
    return Finding(
        "dropout",
        False,
        f"in training mode, N-pass itself differs from run to run: {found}; load the model with 0",
        difference,
    )


def _compare_turns(
    report: VerifyReport,
    model: PreTrainedModel,
    wider: nn.Module,
    chats: Sequence[Chat],
    backend: str,
    progress: Progress,
) -> None:
    """Add the figures of every turn, of the changed branches and of the negative control."""
    groups = parameter_groups(model)
    chosen = max(range(len(chats)), key=lambda index: len(chats[index].samples))
    total = sum(len(chat.samples) for chat in chats)
    for index, number in progress(_turns(chats), total):
        chat = chats[index]
        if number == 0:
            with _patched(model, backend):
                right = row_logprobs(model, chat.row)
                report.branch_changes.extend(_branch_changes(model, chat.row))
                if index == chosen:
                    control, wrong_end, affected = _wrong_mask(chat)
                    wrong = row_logprobs(model, chat.row, subtree_end=wrong_end)
                    report.control = Control(control, [])
        sample = chat.samples[number]
        npass, exact = npass_turn(model, sample), npass_turn(wider, sample)
        place = (index, chat.where, sample.key, number)
        turn = TurnNumbers(*place)
        turn.take(single_pass_turn(model, chat.row, right, number, sample), npass, exact, groups)
        report.turns.append(turn)
        if index == chosen and affected[number] and report.control is not None:
            failing = TurnNumbers(*place)
            ours = single_pass_turn(model, chat.row, wrong, number, sample)
            failing.take(ours, npass, exact, groups)
            report.control.turns.append(failing)


def _compare_step(
    report: VerifyReport,
    model: PreTrainedModel,
    wider: nn.Module,
    chats: Sequence[Chat],
    backend: str,
) -> None:
    """Add the figures of one training step: all conversations in one row, the model's own loss."""
    row = PackedRow.from_trees([build_tree(chat.samples) for chat in chats])
    samples = [sample for chat in chats for sample in chat.samples]
    num_trained = sum(sample.num_trained for sample in samples)
    groups: dict[str, ParameterGroup] = parameter_groups(model)
    with _patched(model, backend):
        loss, ours = step_result(model, [row.to_batch()], num_trained)
    batches = list(npass_batches(samples))
    expected, theirs = step_result(model, batches, num_trained)
    _, exact = step_result(wider, batches, num_trained)
    report.step = StepNumbers(
        num_tokens=len(row),
        num_trained=num_trained,
        loss=expected,
        loss_difference=abs(loss - expected),
        gradients=group_norms(ours, theirs, exact, groups),
    )


def _branch_changes(model: nn.Module, row: PackedRow) -> Iterator[tuple[float, float]]:
    """What other tokens make of a change in a branch that they do not see.

    The tokens at the end of the first chain that no later token descends from are exchanged.

    Yields:
        Mean absolute change of the losses of all later tokens, and the mean loss; nothing for a row
        without a fork.
    """
    end = row.subtree_end
    stop = int(np.flatnonzero(end == np.arange(1, end.size + 1))[0]) + 1
    if stop == end.size or not (row.shift_labels[stop:] >= 0).any():
        return
    start = int(np.flatnonzero(end[:stop] == stop)[0])
    ids = row.input_ids.copy()
    ids[start:stop] = row.input_ids[start - 1 : stop - 1] if start else row.input_ids[-stop:]
    changed = dataclasses.replace(row, input_ids=ids)
    with torch.no_grad():
        before, after = (row_logprobs(model, x).double().cpu()[stop:] for x in (row, changed))
    trained = torch.from_numpy(row.shift_labels[stop:] >= 0)
    yield float((after - before)[trained].abs().mean()), float(before[trained].abs().mean())


def _wrong_mask(chat: Chat) -> tuple[str, np.ndarray, list[bool]]:
    """A wrong mask for the negative control: its name, subtree ends, and which turns it changes."""
    end = chat.row.subtree_end
    if (end == end.size).all():
        cut = max(1, end.size // 2)
        halves = np.where(np.arange(end.size) < cut, cut, end.size).astype(end.dtype)
        return "the first half hidden", halves, [len(sample) > cut for sample in chat.samples]
    affected = [
        not np.array_equal(index, np.arange(index.size)) for index in chat.row.sample_indices
    ]
    return "plain causal", np.full_like(end, end.size), affected


def _turns(chats: Sequence[Chat]) -> Iterator[tuple[int, int]]:
    for index, chat in enumerate(chats):
        for number in range(len(chat.samples)):
            yield index, number


@contextmanager
def _patched(model: PreTrainedModel, backend: str) -> Iterator[None]:
    patch(model, backend=backend)
    try:
        yield
    finally:
        unpatch(model)


def _one_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text.strip() or type(error).__name__


__all__ = ["Chat", "Difference", "Finding", "VerifyReport", "verify_model"]
