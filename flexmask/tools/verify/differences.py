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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flexmask.tools.verify.gradients import PassResult
from flexmask.tools.verify.parameter_groups import ParameterGroup


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference from N-pass and its bound, both relative to the value itself."""

    value: float
    bound: float

    @classmethod
    def relative(
        cls, difference: float, error: float, size: float, dtype: torch.dtype
    ) -> Difference:
        """A difference between two values of a size, one of which is known to be off by `error`."""
        if size == 0:
            return cls(difference, 3 * error)
        return cls(difference / size, 3 * error / size + torch.finfo(dtype).eps / 2)

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

    def to_json(self) -> dict[str, float | None]:
        """Both numbers as plain data."""
        return {"difference": finite(self.value), "bound": finite(self.bound)}


class Place(NamedTuple):
    """Where a turn is.

    Attributes:
        conversation: its number among those checked, from 0.
        where: the line that it came from, or None.
        message: index of the message in it.
        turn: number of the sample in it, from 0.
    """

    conversation: int
    where: str | None
    message: Any
    turn: int

    def __str__(self) -> str:
        return f"{self.where or f'conversation {self.conversation}'}, message {self.message}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The single pass beside N-pass, in one turn or in one training step.

    Attributes:
        loss: mean loss of the trained tokens in N-pass.
        loss_difference: of the single pass from it.
        token_error: mean absolute error of the tokens' losses in N-pass; of a step 0.
        num_trained: how many tokens are trained.
        gradients: by group.
        place: of a turn; None of a step.
    """

    loss: float
    loss_difference: float
    token_error: float
    num_trained: int
    gradients: dict[ParameterGroup, Difference]
    place: Place | None = None

    @property
    def worst_gradients(self) -> dict[str, tuple[ParameterGroup, Difference]]:
        """For each kind of parameter, the layer whose difference is largest by its bound."""
        worst: dict[str, tuple[ParameterGroup, Difference]] = {}
        for group, difference in self.gradients.items():
            if group.kind not in worst or difference.by_bound > worst[group.kind][1].by_bound:
                worst[group.kind] = (group, difference)
        return worst


def compare(
    single: PassResult,
    npass: PassResult,
    wider: PassResult,
    groups: Mapping[str, ParameterGroup],
    dtype: torch.dtype,
    *,
    num_trained: int,
    place: Place | None = None,
) -> Comparison:
    """The single pass beside N-pass; squares of gradients are summed up in fp64.

    Args:
        single: the result of one turn or of one step in a single pass.
        npass: in N-pass.
        wider: in N-pass of a wider type.
        groups: of the parameters, by name.
        dtype: of the model.
        num_trained: how many tokens are trained.
        place: of a turn; None of a step.
    """
    squares: dict[ParameterGroup, torch.Tensor] = {}
    for name, group in groups.items():
        found = [x.gradients[name] for x in (single, npass, wider)]
        ours, theirs, exact = (x.to(found[0].device).double().flatten() for x in found)
        parts = torch.stack([x @ x for x in (ours - theirs, theirs - exact, theirs)]).cpu()
        squares[group] = squares.get(group, 0) + parts
    gradients = {}
    for group, total in squares.items():
        difference, error, size = total.sqrt().tolist()
        gradients[group] = Difference.relative(difference, error, size, dtype)
    token_error = 0.0 if place is None else float((npass.losses - wider.losses).abs().mean())
    loss = float(npass.losses.mean())
    loss_difference = abs(float(single.losses.mean()) - loss)
    return Comparison(loss, loss_difference, token_error, num_trained, gradients, place)


def summing_error(num_terms: int) -> float:
    """What a sum of positive fp32 numbers may be off by, relative: sqrt(n) roundings.

    Worst cases aside, rounding errors of a sum grow with the square root of its length (Higham and
    Mary, SIAM J. Sci. Comput. 41, 2019).
    """
    return math.sqrt(num_terms) * torch.finfo(torch.float32).eps / 2


def finite(value: float) -> float | None:
    """The value, None for one that JSON has no number for."""
    return value if math.isfinite(value) else None
