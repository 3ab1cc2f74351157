"""What a model would make of a plan: operations, speed-up and memory, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from flexmask.loading import meta_model
from flexmask.plan.cost import CostModel, Work
from flexmask.plan.memory import logits_bytes_per_token, saved_bytes_per_token, state_bytes
from flexmask.plan.survey import TILE, Plan


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predictions for one pass over the data with one model.

    Attributes:
        model_type: the model's family.
        dtype: of weights and gradients.
        num_parameters: of the model.
        npass_flops, single_pass_flops: operations of forward and backward, attention by visible
            pair.
        speed_up: their quotient; N-pass and packed N-pass have the same operations.
        speed_up_by_tiles: the same with attention by visited tile, as kernels that work on whole
            tiles of 128 x 128 pay for it.
        num_bounded_layers: attention layers with a window or chunk. Their operations are counted
            without it, so that both ways are cheaper than predicted.
        state_bytes: weights, gradients and AdamW's moments.
        saved_bytes_per_token: what autograd keeps for a token; None where shapes do not tell.
        activation_bytes: by way, for its largest row: what autograd keeps, logits and their
            gradient; None where shapes do not tell.
    """

    model_type: str
    dtype: str
    num_parameters: int
    npass_flops: float
    single_pass_flops: float
    speed_up: float
    speed_up_by_tiles: float
    num_bounded_layers: int
    state_bytes: int
    saved_bytes_per_token: float | None
    activation_bytes: Mapping[str, int] | None

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


def estimate(plan: Plan, config: PreTrainedConfig, dtype: torch.dtype) -> Estimate:
    """The predictions for `plan` with the model that `config` describes.

    Rows are single conversations, cut to the budget where the plan has one.

    Raises:
        UnsupportedModelError: the model cannot be patched.
    """
    model = meta_model(config, dtype)
    cost = CostModel.of(model)
    tiled = [
        Work(work.num_tokens, num_tiles * TILE**2)
        for work, num_tiles in (
            (plan.npass, plan.npass_tiles),
            (plan.single_pass, plan.single_pass_tiles),
        )
    ]
    saved = saved_bytes_per_token(model)
    activations = None
    if saved is not None:
        budget = plan.overflow.max_tokens if plan.overflow else None
        per_token = saved + logits_bytes_per_token(model)
        activations = {
            way: round(per_token * (size if budget is None else min(size, budget)))
            for way, size in asdict(plan.largest).items()
        }
    return Estimate(
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=cost.num_parameters,
        npass_flops=cost.flops(plan.npass),
        single_pass_flops=cost.flops(plan.single_pass),
        speed_up=cost.speed_up(plan.npass, plan.single_pass),
        speed_up_by_tiles=cost.speed_up(*tiled),
        num_bounded_layers=cost.num_bounded,
        state_bytes=state_bytes(model),
        saved_bytes_per_token=saved,
        activation_bytes=activations,
    )
