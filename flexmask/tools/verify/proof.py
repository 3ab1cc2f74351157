"""Proof, on a user's own model, data and backend, that the single pass equals N-pass.

What is compared, and with which bound: `flexmask.tools.verify.differences`. Whatever stands in the
way of the comparison is a finding too, so a verification ends with a report, not with a traceback.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from flexmask.errors import FlexmaskError, one_line, pluralize
from flexmask.model import patch, unpatch
from flexmask.model.experts import without_auxiliary_loss
from flexmask.model.sequence_group import SequenceGroup
from flexmask.model.structure import active_dropouts, text_config
from flexmask.packing.rows import PackedRow
from flexmask.tools.verify.differences import Comparison, Difference, Place, compare
from flexmask.tools.verify.gradients import (
    PassResult,
    StepSum,
    npass_losses,
    npass_result,
    padded_batch,
    row_logprobs,
    single_pass_losses,
    step_result,
    turn_result,
)
from flexmask.tools.verify.parameter_groups import parameter_groups
from flexmask.tools.verify.report import Control, VerifyReport
from flexmask.tree.build import build_tree
from flexmask.tree.sample import Sample

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
Progress = Callable[[Iterable[Any]], Iterable[Any]]
# What a model raises that cannot take a batch; out of memory is among them.
_RUN_ERRORS = (FlexmaskError, RuntimeError, IndexError)


@dataclass(frozen=True, eq=False)
class Chat:
    """A conversation to check: its samples, and where it came from."""

    samples: Sequence[Sample]
    where: str | None = None

    @cached_property
    def row(self) -> PackedRow:
        """Its packed row."""
        return PackedRow.from_trees([build_tree(self.samples)])


def verify_model(
    model: PreTrainedModel,
    chats: Sequence[Chat],
    *,
    backend: str = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    sequence_group: Any = None,
    progress: Progress = iter,
    tell: Callable[[Comparison], object] = lambda turn: None,
) -> VerifyReport:
    """The findings and figures for an unpatched model; it is left unpatched, in training mode.

    Args:
        model: in float32, bfloat16 or float16.
        chats: the conversations, at least one.
        backend: as in `patch`, like the next.
        kernel_options: likewise.
        sequence_group: likewise; all of its processes call this.
        progress: wraps the list of turns, such as `tqdm.tqdm`, whose postfix says what is done.
        tell: called with the figures of each turn when it has been compared.
    """
    report = VerifyReport(dtype=model.dtype)
    with without_auxiliary_loss(text_config(model)) as had_one:
        options = {"backend": backend, "kernel_options": kernel_options}
        options["sequence_group"] = sequence_group
        _Verification(report, model, chats, options).run(progress, tell)
    if had_one:
        text = "one sample has another than a batch of all, so all was compared without it"
        report.add("auxiliary loss", True, text)
    return report


class _Verification:
    """The checks of one model, each of which adds its findings or figures to the report."""

    def __init__(
        self,
        report: VerifyReport,
        model: PreTrainedModel,
        chats: Sequence[Chat],
        options: dict[str, Any],  # of `patch`
    ) -> None:
        self.report = report
        self.model = model.train()
        self.wider = _widened(model)
        self.chats = chats
        self.options = options
        group = options["sequence_group"]
        self.ranks = None if group is None else SequenceGroup.of(group)
        self.groups = parameter_groups(model)
        self.turns = [
            Place(index, chat.where, sample.key, number)
            for index, chat in enumerate(chats)
            for number, sample in enumerate(chat.samples)
        ]
        self.samples = [sample for chat in chats for sample in chat.samples]
        num_trained = sum(sample.num_trained for sample in self.samples)
        self.npass_step, self.exact_step = StepSum(num_trained), StepSum(num_trained)

    def run(self, progress: Progress, tell: Callable[[Comparison], object]) -> None:
        """Make all checks, up to one that makes the next ones useless."""
        try:
            self.check_noise(min(self.samples, key=len))
        except _RUN_ERRORS as error:
            text = f"the model cannot run a sample: {one_line(error)}"
            self.report.add("N-pass", False, text)
            return
        try:
            with self.patched():
                name = text_config(self.model).model_type
        except FlexmaskError as error:
            self.report.add("patch", False, str(error))
            return
        self.report.add("patch", True, f"model_type {name!r} is verified")
        if not self.report.is_proved:
            return
        try:
            self.compare_turns(progress, tell)
            self.compare_step()
        except KeyboardInterrupt:
            self._add_stop("by the user")
        except _RUN_ERRORS as error:
            text = one_line(error)
            if "ignored the mask" in text:
                self.report.add("mask", False, text)
            else:
                self._add_stop(text)
        self.report.judge()

    def check_noise(self, sample: Sample) -> None:
        """Check that two runs of one sample in training mode differ by no more than rounding."""
        model = self.model
        with torch.no_grad():
            model.eval()
            exact = npass_losses(self.wider, sample).double()
            error = float((npass_losses(model, sample).double() - exact).abs().mean())
            model.train()
            first, second = (npass_losses(model, sample).double() for _ in range(2))
        noise = float((first - second).abs().mean())
        difference = Difference.relative(noise, error, float(exact.abs().mean()), model.dtype)
        text = "in training mode, N-pass gives the same losses twice"
        if not difference.is_within:
            rates = [
                f"{name} = {value}"
                for name, value in vars(text_config(model)).items()
                if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
            ]
            names = [f"{name} (p = {p})" for name, p in active_dropouts(model)]
            found = ", ".join([*rates, *names][:4]) or "no dropout by that name"
            text = (
                f"in training mode, N-pass itself differs from run to run: {found}; load the model "
                "with 0"
            )
        self.report.add("dropout", difference.is_within, text, difference)

    def compare_turns(self, progress: Progress, tell: Callable[[Comparison], object]) -> None:
        """Compare every turn; exchange the end of a branch; make the negative control."""
        model, report = self.model, self.report
        chosen = max(range(len(self.chats)), key=lambda index: len(self.chats[index].samples))
        name, wrong_end, changed = _wrong_mask(self.chats[chosen])
        bar = progress(self.turns)
        say = getattr(bar, "set_postfix_str", lambda text: None)
        for place in bar:
            chat, number = self.chats[place.conversation], place.turn
            sample = chat.samples[number]
            if number == 0:
                say("mask")
                with self.patched():
                    report.branch_changes.extend(_branch_changes(model, chat.row))
            say("N-pass")
            npass = npass_result(model, sample)
            say(f"N-pass in {str(self.wider.dtype).removeprefix('torch.')}")
            exact = npass_result(self.wider, sample)
            self.npass_step.add(npass)
            self.exact_step.add(exact)
            say("single pass")
            report.turns.append(self.compare_turn(place, npass, exact))
            tell(report.turns[-1])
            if (place.conversation, number) == (chosen, changed):
                say("wrong mask")
                wrong = self.compare_turn(place, npass, exact, subtree_end=wrong_end)
                report.control = Control(name, wrong)

    def compare_turn(
        self, place: Place, npass: PassResult, exact: PassResult, **mask: Any
    ) -> Comparison:
        """A turn in a single pass of its conversation beside N-pass; `mask`: of `row_logprobs`."""
        chat, model = self.chats[place.conversation], self.model
        sample = chat.samples[place.turn]
        with self.patched():
            logprobs = row_logprobs(model, chat.row, **mask)
            losses = single_pass_losses(chat.row, logprobs, place.turn, sample)
            ours = turn_result(model, losses).averaged(self.ranks)
        found = (ours, npass, exact, self.groups, model.dtype)
        return compare(*found, num_trained=sample.num_trained, place=place)

    def compare_step(self) -> None:
        """Compare one training step: all conversations in one row, the model's own loss."""
        model = self.model
        row = PackedRow.from_trees([build_tree(chat.samples) for chat in self.chats])
        num_trained = self.npass_step.num_trained
        with self.patched():
            batch = padded_batch(row, self.ranks)
            ours = step_result(model, batch, num_trained).averaged(self.ranks)
        found = (ours, self.npass_step.result, self.exact_step.result, self.groups, model.dtype)
        self.report.step = (compare(*found, num_trained=num_trained), len(row))

    def _add_stop(self, reason: str) -> None:
        done = f"after {len(self.report.turns)} of {pluralize(len(self.turns), 'turn')}"
        self.report.add("stopped", False, f"{done}: {reason}")

    @contextmanager
    def patched(self) -> Iterator[None]:
        """A block in which the model is patched."""
        patch(self.model, **self.options)
        try:
            yield
        finally:
            unpatch(self.model)


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in a wider type, without dropout: where rounding is measured from."""
    wider: Any = copy.deepcopy(model)
    if any(".experts" in name for name, _ in wider.named_modules()):
        wider.set_experts_implementation("eager")  # grouped kernels take no float64
    if "flash" in (text_config(wider)._attn_implementation or ""):
        wider.set_attn_implementation("sdpa")  # flash kernels take 16 bits only
    return wider.to(WIDER[model.dtype]).eval()


def _branch_changes(model: PreTrainedModel, row: PackedRow) -> Iterator[tuple[float, float]]:
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


def _wrong_mask(chat: Chat) -> tuple[str, np.ndarray, int]:
    """A wrong mask for the negative control: name, subtree ends, the turn that it changes most."""
    end = chat.row.subtree_end
    if (end == end.size).all():
        cut = max(1, end.size // 2)
        halves = np.where(np.arange(end.size) < cut, cut, end.size).astype(end.dtype)
        lengths = [len(sample) for sample in chat.samples]
        return "the first half hidden", halves, int(np.argmax(lengths))
    foreign = [index[-1] + 1 - index.size for index in chat.row.sample_indices]
    return "plain causal", np.full_like(end, end.size), int(np.argmax(foreign))
