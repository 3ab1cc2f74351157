"""How much each trained token counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from flexmask.errors import DataError
from flexmask.tree.sample import Sample

Weighting = Literal["token", "turn", "conversation"]


def check_weighting(weighting: Weighting) -> None:
    """Raise DataError for an unknown weighting."""
    if weighting not in get_args(Weighting):
        raise DataError(f"weighting must be one of {get_args(Weighting)}, got {weighting!r}")


def weigh_samples(samples: Sequence[Sample], weighting: Weighting = "token") -> list[Sample]:
    """The samples of one conversation with their loss weights scaled.

    Args:
        samples: all samples of one conversation.
        weighting: "token": each trained token counts as much as its weight says (once, unless
            told otherwise); "turn": the weights of each sample add up to 1; "conversation": those
            of all samples together add up to 1.

    Raises:
        DataError: an unknown weighting.
    """
    check_weighting(weighting)
    if weighting == "token":
        return list(samples)
    totals = [float(sample.loss_weights[1:].sum()) for sample in samples]
    if weighting == "conversation":
        totals = [sum(totals)] * len(totals)
    return [
        Sample(s.input_ids, s.loss_weights / total if total else s.loss_weights, s.key)
        for s, total in zip(samples, totals, strict=True)
    ]
