"""What a verification found: its findings, the figures behind them, and both as text and data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flexmask.errors import pluralize
from flexmask.tools.verify.differences import (
    Difference,
    Norms,
    TurnNumbers,
    gradient_difference,
    loss_difference,
    relative_difference,
    summing_error,
)
from flexmask.tools.verify.parameter_groups import GROUPS, ParameterGroup


class Finding(NamedTuple):
    """One thing that was checked, whether it is as it should be, and what was seen."""

    name: str
    is_ok: bool
    text: str
    difference: Difference | None = None


@dataclass(slots=True)
class Control:
    """The negative control: `mask` names a wrong mask, `turns` are those that it changes."""

    mask: str
    turns: list[TurnNumbers]


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """One training step, before bounds: all conversations in one row.

    Attributes:
        num_tokens: of the row.
        num_trained: trained tokens of all samples.
        loss, loss_difference: of N-pass, and of the single pass from it.
        gradients: by group.
    """

    num_tokens: int
    num_trained: int
    loss: float
    loss_difference: float
    gradients: dict[ParameterGroup, Norms]


@dataclass(slots=True)
class VerifyReport:
    """The outcome of a verification.

    Attributes:
        dtype: of the model.
        checked: what was checked, in words and numbers.
        findings: in the order of the checks; later checks are left out where an earlier one failed.
        turns: the figures of each turn.
        step: those of a whole step.
        control: those of the negative control.
        branch_changes: for each row with a fork, the mean change of losses that must not change,
            and the mean loss.
    """

    dtype: torch.dtype = torch.float32
    checked: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    turns: list[TurnNumbers] = field(default_factory=list)
    step: StepNumbers | None = None
    control: Control | None = None
    branch_changes: list[tuple[float, float]] = field(default_factory=list)

    @property
    def is_proved(self) -> bool:
        """Whether every finding so far is as it should be."""
        return all(finding.is_ok for finding in self.findings)

    @property
    def typical_error(self) -> float:
        """Mean absolute error of a trained token's loss in N-pass."""
        num_tokens = sum(turn.num_tokens for turn in self.turns)
        return sum(turn.token_error * turn.num_tokens for turn in self.turns) / max(num_tokens, 1)

    def add(self, finding: Finding) -> None:
        """Note a finding."""
        self.findings.append(finding)

    def fail(self, name: str, text: str) -> None:
        """Note a finding that is not as it should be."""
        self.findings.append(Finding(name, False, text))

    def judge(self) -> None:
        """Turn the figures of turns, step and control into findings."""
        self.findings.extend(
            (
                self._judge_mask(),
                self._judge_losses(),
                self._judge_gradients(),
                self._judge_step(),
                self._judge_control(),
            )
        )

    def loss_of(self, turn: TurnNumbers) -> Difference:
        """The difference of a turn's loss and its bound."""
        return loss_difference(turn, self.typical_error, self.dtype)

    def gradients_of(
        self, gradients: dict[ParameterGroup, Norms]
    ) -> dict[str, tuple[ParameterGroup, Difference]]:
        """For each kind of parameter, the layer whose difference is largest by its bound."""
        worst: dict[str, tuple[ParameterGroup, Difference]] = {}
        for group, norms in gradients.items():
            difference = gradient_difference(norms, self.dtype)
            if group.kind not in worst or difference.by_bound > worst[group.kind][1].by_bound:
                worst[group.kind] = (group, difference)
        return {kind: worst[kind] for kind in GROUPS if kind in worst}

    def _judge_mask(self) -> Finding:
        if not self.branch_changes:
            return Finding(
                "mask", True, "no conversation has a fork, so there is no branch to hide"
            )
        differences = [
            relative_difference(change, self.typical_error, size, self.dtype)
            for change, size in self.branch_changes
        ]
        worst = max(differences, key=lambda difference: difference.by_bound)
        text = "a change in one branch leaves the losses of the others alone"
        if not worst.is_within:
            text = (
                "the model ignores the mask: a change in one branch changes the losses of others; "
                "its attention does not do what the mask says"
            )
        rows = pluralize(len(differences), "row")
        return Finding("mask", worst.is_within, f"{text} ({rows})", worst)

    def _judge_losses(self) -> Finding:
        found = [(self.loss_of(turn), turn) for turn in self.turns]
        worst, turn = max(found, key=lambda pair: pair[0].by_bound)
        where = f"largest by its bound at {_place(turn)}"
        return Finding("loss", worst.is_within, f"{pluralize(len(found), 'turn')}, {where}", worst)

    def _judge_gradients(self) -> Finding:
        found = [
            (difference, group, turn)
            for turn in self.turns
            for group, difference in self.gradients_of(turn.gradients).values()
        ]
        worst, group, turn = max(found, key=lambda triple: triple[0].by_bound)
        where = f"largest by its bound in {group} at {_place(turn)}"
        turns = pluralize(len(self.turns), "turn")
        return Finding("gradients", worst.is_within, f"{turns}, {where}", worst)

    def _judge_step(self) -> Finding:
        if self.step is None:
            raise AssertionError("turns are judged together with a step")
        found = {str(g): d for g, d in self.gradients_of(self.step.gradients).values()}
        found["loss"] = self._step_loss(self.step)
        name = max(found, key=lambda name: found[name].by_bound)
        text = (
            f"all in one row of {self.step.num_tokens:,} tokens, the model's own loss; largest by "
            f"its bound in {name}"
        )
        return Finding("step", found[name].is_within, text, found[name])

    def _step_loss(self, step: StepNumbers) -> Difference:
        found = relative_difference(
            step.loss_difference, self.typical_error, abs(step.loss), self.dtype
        )
        return Difference(found.value, found.bound + summing_error(step.num_trained))

    def _judge_control(self) -> Finding:
        if self.control is None:
            raise AssertionError("turns are judged together with a control")
        worst = [self._worst(turn) for turn in self.control.turns]
        failing = [difference for difference in worst if not difference.is_within]
        largest = max(worst, key=lambda difference: difference.by_bound)
        if failing:
            text = (
                f"a wrong mask ({self.control.mask}) fails this check, as it must, in "
                f"{len(failing)} of {pluralize(len(worst), 'turn')} that it changes, by up to "
                f"{largest.by_bound:,.0f} times the bound"
            )
        else:
            text = (
                f"a wrong mask ({self.control.mask}) passes this check, so it proves nothing; "
                "check more conversations, or in --dtype float32"
            )
        return Finding("control", bool(failing), text, largest)

    def _worst(self, turn: TurnNumbers) -> Difference:
        differences = [d for _, d in self.gradients_of(turn.gradients).values()]
        return max([self.loss_of(turn), *differences], key=lambda d: d.by_bound)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; numbers that are not finite become null."""
        return {
            "proved": self.is_proved,
            "checked": self.checked,
            "findings": [
                {
                    "name": finding.name,
                    "ok": finding.is_ok,
                    "text": finding.text,
                    **(_plain(finding.difference) if finding.difference else {}),
                }
                for finding in self.findings
            ],
            "turns": [self._turn_json(turn) for turn in self.turns],
            "step": None if self.step is None else self._step_json(self.step),
            "control": None
            if self.control is None
            else {
                "mask": self.control.mask,
                "turns": [self._turn_json(turn) for turn in self.control.turns],
            },
        }

    def _turn_json(self, turn: TurnNumbers) -> dict[str, Any]:
        return {
            "conversation": turn.conversation,
            "where": turn.where,
            "message": turn.message,
            "turn": turn.turn,
            "trained_tokens": turn.num_tokens,
            "loss": _finite(turn.loss),
            "loss_difference": _plain(self.loss_of(turn)),
            "gradients": self._gradients_json(turn.gradients),
        }

    def _step_json(self, step: StepNumbers) -> dict[str, Any]:
        return {
            "tokens": step.num_tokens,
            "loss": _finite(step.loss),
            "loss_difference": _plain(self._step_loss(step)),
            "gradients": self._gradients_json(step.gradients),
        }

    def _gradients_json(self, gradients: dict[ParameterGroup, Norms]) -> dict[str, Any]:
        return {
            kind: {"layer": group.layer, **_plain(difference)}
            for kind, (group, difference) in self.gradients_of(gradients).items()
        }

    def __str__(self) -> str:
        """The report for the terminal."""
        parts = [f"{name:<11}{value}" for name, value in self.checked.items()]
        parts = ["\n".join(parts)] if parts else []
        parts.append("\n".join(_finding_lines(self.findings)))
        if self.turns and self.step is not None:
            parts.append("\n".join(self._table()))
        verdict = (
            "proved: on this model, data and backend the single pass equals N-pass within the "
            "rounding of N-pass itself"
            if self.is_proved
            else "NOT proved: " + ", ".join(f.name for f in self.findings if not f.is_ok)
        )
        return "\n\n".join([*parts, verdict])

    def _table(self) -> Iterator[str]:
        """One line for each turn number, with the worst of all conversations, and the step."""
        yield "largest difference of single-pass from N-pass, relative (share of its bound)"
        rows: dict[str, dict[str, Difference]] = {}
        for turn in sorted(self.turns, key=lambda turn: turn.turn):
            found = {"loss": self.loss_of(turn)} | {
                kind: difference
                for kind, (_, difference) in self.gradients_of(turn.gradients).items()
            }
            row = rows.setdefault(f"turn {turn.turn + 1}", {})
            for name, difference in found.items():
                if name not in row or difference.by_bound > row[name].by_bound:
                    row[name] = difference
        if self.step is not None:
            rows["whole step"] = {"loss": self._step_loss(self.step)} | {
                kind: d for kind, (_, d) in self.gradients_of(self.step.gradients).items()
            }
        names = list(next(iter(rows.values())))
        yield f"{'':<12}" + "".join(f"{name:>16}" for name in names)
        for label, row in rows.items():
            cells = (f"{row[n].value:.1e} ({row[n].by_bound:.2f})" for n in names)
            yield f"{label:<12}" + "".join(f"{cell:>16}" for cell in cells)


def _finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    for finding in findings:
        status = "ok" if finding.is_ok else "FAILED"
        yield f"{status:<8}{finding.name:<11}{finding.text}"
        if finding.difference is not None:
            difference = finding.difference
            yield f"{'':<19}difference {difference.value:.1e}, bound {difference.bound:.1e}"


def _place(turn: TurnNumbers) -> str:
    return f"{turn.where or f'conversation {turn.conversation}'}, message {turn.message}"


def _plain(difference: Difference) -> dict[str, float | None]:
    return {"difference": _finite(difference.value), "bound": _finite(difference.bound)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
