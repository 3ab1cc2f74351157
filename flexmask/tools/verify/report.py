"""What a verification found: its findings, the figures behind them, and both as text and data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flexmask.errors import pluralize
from flexmask.tools.table import table
from flexmask.tools.verify.differences import Comparison, Difference, finite, summing_error
from flexmask.tools.verify.parameter_groups import GROUPS, ParameterGroup

_LOSS = ParameterGroup("loss", None)


class Finding(NamedTuple):
    """One thing that was checked, whether it is as it should be, and what was seen."""

    name: str
    is_ok: bool
    text: str
    difference: Difference | None = None

    def __str__(self) -> str:
        line = f"{'ok' if self.is_ok else 'FAILED':<8}{self.name:<11}{self.text}"
        if self.difference is None:
            return line
        value, bound = self.difference.value, self.difference.bound
        return f"{line}\n{'':<19}difference {value:.1e}, bound {bound:.1e}"

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        data = {"name": self.name, "ok": self.is_ok, "text": self.text}
        return data if self.difference is None else data | self.difference.to_json()


class Control(NamedTuple):
    """The negative control: `mask` names a wrong mask, `turn` is one that it changes."""

    mask: str
    turn: Comparison


@dataclass(slots=True)
class VerifyReport:
    """The outcome of a verification.

    Attributes:
        dtype: of the model.
        checked: what was checked, in words and numbers.
        findings: in the order of the checks; later checks are left out where an earlier one failed.
        turns: the figures of each turn.
        step: those of one training step, and the tokens of its row.
        control: those of the negative control.
        branch_changes: for each row with a fork, the mean change of losses that must not change,
            and the mean loss.
    """

    dtype: torch.dtype = torch.float32
    checked: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    turns: list[Comparison] = field(default_factory=list)
    step: tuple[Comparison, int] | None = None
    control: Control | None = None
    branch_changes: list[tuple[float, float]] = field(default_factory=list)

    @property
    def is_proved(self) -> bool:
        """Whether every finding so far is as it should be."""
        return all(finding.is_ok for finding in self.findings)

    @property
    def typical_error(self) -> float:
        """Mean absolute error of a trained token's loss in N-pass."""
        num_trained = sum(turn.num_trained for turn in self.turns)
        return sum(turn.token_error * turn.num_trained for turn in self.turns) / max(num_trained, 1)

    def add(self, name: str, is_ok: bool, text: str, difference: Difference | None = None) -> None:
        """Note a finding."""
        self.findings.append(Finding(name, is_ok, text, difference))

    def loss_of(self, compared: Comparison) -> Difference:
        """The difference of the loss of a turn or step, and its bound."""
        error = max(compared.token_error, self.typical_error)
        found = Difference.relative(compared.loss_difference, error, abs(compared.loss), self.dtype)
        if compared.place is not None:
            return found
        return Difference(found.value, found.bound + summing_error(compared.num_trained))

    def judge(self) -> None:
        """Turn the figures of turns, step and control into findings, as far as there are any."""
        if not self.turns:
            return
        self._judge_mask()
        turns = pluralize(len(self.turns), "turn")
        losses = [(self.loss_of(turn), f"at {turn.place}") for turn in self.turns]
        self._add_worst("loss", f"{turns},", losses)
        gradients = [
            (difference, f"in {group} at {turn.place}")
            for turn in self.turns
            for group, difference in turn.gradients.items()
        ]
        self._add_worst("gradients", f"{turns},", gradients)
        if self.step is not None:
            step, num_tokens = self.step
            whole = [(difference, f"in {group}") for group, difference in self._differences(step)]
            row = f"all in one row of {num_tokens:,} tokens, the model's own loss;"
            self._add_worst("step", row, whole)
        if self.control is not None:
            self._judge_control(self.control)

    def _add_worst(self, name: str, text: str, found: list[tuple[Difference, str]]) -> None:
        worst, at = max(found, key=lambda pair: pair[0].by_bound)
        self.add(name, worst.is_within, f"{text} largest by its bound {at}", worst)

    def _judge_mask(self) -> None:
        if not self.branch_changes:
            text = "no conversation has a fork, so there is no branch to hide"
            self.add("mask", True, text)
            return
        found = [
            Difference.relative(change, self.typical_error, size, self.dtype)
            for change, size in self.branch_changes
        ]
        worst = _worst(found)
        text = "a change in one branch leaves the losses of the others alone"
        if not worst.is_within:
            text = (
                "the model ignores the mask: a change in one branch changes the losses of others; "
                "its attention does not do what the mask says"
            )
        rows = pluralize(len(found), "row")
        self.add("mask", worst.is_within, f"{text} ({rows})", worst)

    def _judge_control(self, control: Control) -> None:
        worst = _worst(difference for _, difference in self._differences(control.turn))
        text = (
            f"passes this check at {control.turn.place}, so it proves nothing; check more "
            "conversations, or in --dtype float32"
            if worst.is_within
            else f"fails this check, as it must, by {worst.by_bound:,.0f} times the bound at "
            f"{control.turn.place}"
        )
        self.add("control", not worst.is_within, f"a wrong mask ({control.mask}) {text}", worst)

    def _differences(self, compared: Comparison) -> list[tuple[ParameterGroup, Difference]]:
        """All differences of a turn or step; that of the loss is a group of its own."""
        return [*compared.gradients.items(), (_LOSS, self.loss_of(compared))]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; numbers that are not finite become null."""
        step, control = self.step, self.control
        return {
            "proved": self.is_proved,
            "checked": self.checked,
            "findings": [finding.to_json() for finding in self.findings],
            "turns": list(map(self._figures, self.turns)),
            "step": step and {"tokens": step[1]} | self._figures(step[0]),
            "control": control and {"mask": control.mask} | self._figures(control.turn),
        }

    def _figures(self, compared: Comparison) -> dict[str, Any]:
        """The figures of a turn or step as plain data."""
        data: dict[str, Any] = {}
        if compared.place is not None:
            data = compared.place._asdict() | {"trained_tokens": compared.num_trained}
        return data | {
            "loss": finite(compared.loss),
            "loss_difference": self.loss_of(compared).to_json(),
            "gradients": {
                kind: {"layer": group.layer, **difference.to_json()}
                for kind, (group, difference) in compared.worst_gradients.items()
            },
        }

    def __str__(self) -> str:
        """The report for the terminal."""
        parts = [[f"{name:<10} {value}" for name, value in self.checked.items()]]
        parts.append(list(map(str, self.findings)))
        if self.turns:
            parts.append(list(self._table()))
        failed = [finding.name for finding in self.findings if not finding.is_ok]
        verdict = (
            f"NOT proved: {', '.join(failed)}"
            if failed
            else "proved: on this model, data and backend the single pass equals N-pass within the "
            "rounding of N-pass itself"
        )
        return "\n\n".join("\n".join(lines) for lines in [*parts, [verdict]] if lines)

    def _table(self) -> Iterator[str]:
        """One line for each turn number, with the worst of all conversations, and the step."""
        yield "largest difference of single-pass from N-pass, relative (share of its bound)"
        turns: dict[int, list[Comparison]] = {}
        for turn in self.turns:
            if turn.place is not None:
                turns.setdefault(turn.place.turn, []).append(turn)
        rows = {f"turn {number + 1}": turns[number] for number in sorted(turns)}
        if self.step is not None:
            rows["whole step"] = [self.step[0]]
        names = ["loss", *(name for name in GROUPS if name in self.turns[0].worst_gradients)]
        lines = [["", *names]]
        for label, compared in rows.items():
            cells = [label]
            for name in names:
                found = [d for c in compared for g, d in self._differences(c) if g.kind == name]
                cells.append(f"{_worst(found).value:.1e} ({_worst(found).by_bound:.2f})")
            lines.append(cells)
        yield table(lines)


def _worst(found: Iterable[Difference]) -> Difference:
    """The difference that is largest by its bound."""
    return max(found, key=lambda difference: difference.by_bound)
