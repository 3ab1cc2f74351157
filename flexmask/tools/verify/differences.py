"""Differences of the single pass from N-pass, and the bound that the data type gives them.

N-pass in the model's data type is itself off from N-pass in a wider one (float64 for float32,
float32 for the 16-bit types) by some error e. The project's correctness budget lets an equally good
evaluation err by at most twice that, plus one rounding, so the two may differ by

    3 e + u |x|,        u = half the distance from 1 to the next number of the data type

and no constant is chosen for the model or the data. Gradients are vectors, one for each kind of
parameter and layer: |.| is the Euclidean norm, and e is measured for the same turn. A loss is a
mean of numbers whose errors may cancel by luck, so there e is the mean of their absolute errors,
that of the turn or that of all turns, whichever is larger. The loss of a whole step is a sum that
the model itself forms in fp32, which adds `summing_error`. A value that is not finite is above any
bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flexmask.tools.verify.parameter_groups import ParameterGroup
from flexmask.tools.verify.turn_gradients import Gradients, TurnResult


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference from N-pass and its bound, both relative to the value itself."""

    value: float
    bound: float

    @property
    def is_within(self) -> bool:
        """Whether the difference is no larger than its bound, and a number."""
        return self.value <= self.bound

    @property
    def by_bound(self) -> float:
        """The difference in units of its bound; infinite for one that is not a number."""
        if math.isnan(self.value) or math.isnan(self.bound):
            return math.inf
        return self.value / self.bound if self.bound else math.inf if self.value else 0.0


@dataclass(frozen=True, slots=True)
class Norms:
    """Of one group of gradients: |N-pass|, |single - N-pass| and |N-pass - wider N-pass|."""

    size: float
    difference: float
    error: float


@dataclass(slots=True)
class TurnNumbers:
    """What was measured of one turn, before bounds.

    Attributes:
        conversation: number of the conversation among those checked, from 0.
        where: the line that it came from, or None.
        message: index of the message in it.
        turn: number of the sample in it, from 0.
        loss: mean loss of the trained tokens in N-pass.
        loss_difference: of single-pass from it.
        token_error: mean absolute error of the tokens' losses in N-pass.
        num_tokens: how many tokens are trained.
        gradients: by group.
    """

    conversation: int
    where: str | None
    message: int
    turn: int
    loss: float = 0.0
    loss_difference: float = 0.0
    token_error: float = 0.0
    num_tokens: int = 0
    gradients: dict[ParameterGroup, Norms] = field(default_factory=dict)

    def take(
        self,
        single: TurnResult,
        npass: TurnResult,
        wider: TurnResult,
        groups: Mapping[str, ParameterGroup],
    ) -> None:
        """Measure a turn."""
        self.loss = float(npass.losses.mean())
        self.loss_difference = abs(float(single.losses.mean()) - self.loss)
        self.token_error = float((npass.losses - wider.losses).abs().mean())
        self.num_tokens = npass.losses.numel()
        self.gradients = group_norms(single.gradients, npass.gradients, wider.gradients, groups)


def group_norms(
    single: Gradients,
    npass: Gradients,
    wider: Gradients,
    groups: Mapping[str, ParameterGroup],
) -> dict[ParameterGroup, Norms]:
    """The norms of each group of parameters, summed up in fp64."""
    sums: dict[ParameterGroup, list[float]] = {}
    for name, group in groups.items():
        ours, theirs, exact = (x[name].double() for x in (single, npass, wider))
        squares = [_square(theirs), _square(ours - theirs), _square(theirs - exact)]
        before = sums.setdefault(group, [0.0, 0.0, 0.0])
        sums[group] = [a + b for a, b in zip(before, squares, strict=True)]
    return {group: Norms(*map(math.sqrt, squares)) for group, squares in sums.items()}


def gradient_difference(norms: Norms, dtype: torch.dtype) -> Difference:
    """The difference of a group's gradient, relative to its norm."""
    return relative_difference(norms.difference, norms.error, norms.size, dtype)


def loss_difference(turn: TurnNumbers, typical_error: float, dtype: torch.dtype) -> Difference:
    """The difference of a turn's loss; `typical_error` is that of a token in all turns."""
    error = max(turn.token_error, typical_error)
    return relative_difference(turn.loss_difference, error, abs(turn.loss), dtype)


def relative_difference(
    difference: float, error: float, size: float, dtype: torch.dtype
) -> Difference:
    """A difference between two values of a size, one of which is known to be off by `error`."""
    if size == 0:
        return Difference(difference, 3 * error)
    rounding = torch.finfo(dtype).eps / 2
    return Difference(difference / size, 3 * error / size + rounding)


def summing_error(num_terms: int) -> float:
    """What two sums of positive fp32 numbers may differ by, relative: sqrt(n) roundings each.

    Worst cases aside, rounding errors of a sum grow with the square root of its length (Higham and
    Mary, SIAM J. Sci. Comput. 41, 2019).
    """
    return 2 * math.sqrt(num_terms) * torch.finfo(torch.float32).eps / 2


def _square(x: torch.Tensor) -> float:
    return float(x.flatten() @ x.flatten())
