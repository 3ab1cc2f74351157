"""What a model would make of a plan: operations, speed-up and memory, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from flexmask.model.cost import CostModel
from flexmask.model.structure import text_config
from flexmask.tools.plan.memory import saved_bytes_per_token
from flexmask.tools.plan.survey import Plan

_COPIES = 4  # weights, gradients, and the two moments of AdamW


@dataclass(frozen=True, slots=True)
class BoundedLayers:
    """Attention layers of one window or chunk, and what each of them sees.

    Attributes:
        window, chunk: in positions, or None.
        layers: how many there are.
        npass_visible_pairs, single_pass_visible_pairs: of one such layer.
        npass_tiles, single_pass_tiles: visited tiles of 128 x 128.
    """

    window: int | None
    chunk: int | None
    layers: int
    npass_visible_pairs: int
    single_pass_visible_pairs: int
    npass_tiles: int
    single_pass_tiles: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predictions for one pass over the data with one model.

    Attributes:
        model_type: the model's family.
        dtype: of weights and gradients.
        num_parameters: of the model.
        npass_flops, one_render_flops, single_pass_flops: operations of forward and backward,
            attention by visible pair; N-pass and packed N-pass have the same.
        speed_up, speed_up_over_one_render: their quotients with those of the single pass; below 1
            where the single pass takes longer.
        speed_up_by_tiles: `speed_up` with attention by visited tile, as kernels that work on whole
            tiles of 128 x 128 pay for it.
        bounded_layers: what layers with a window or chunk see, by kind.
        state_bytes: weights, gradients and AdamW's moments.
        saved_bytes_per_token: what autograd keeps for a token; None where shapes do not tell.
        activation_bytes: by way, for its largest row: what autograd keeps, logits and their
            gradient; None where shapes do not tell.
        sequence_parallel_size: processes that share the tokens of a row of the single pass, n.
        shared_activation_bytes: what each of n keeps of that way's largest row; None for one.
    """

    model_type: str
    dtype: str
    num_parameters: int
    npass_flops: float
    one_render_flops: float
    single_pass_flops: float
    speed_up: float
    speed_up_over_one_render: float
    speed_up_by_tiles: float
    bounded_layers: Sequence[BoundedLayers]
    state_bytes: int
    saved_bytes_per_token: float | None
    activation_bytes: Mapping[str, int] | None
    sequence_parallel_size: int = 1
    shared_activation_bytes: int | None = None


def estimate(plan: Plan, model: PreTrainedModel, sequence_parallel_size: int = 1) -> Estimate:
    """The predictions for `plan` with a model on the meta device, whose attention is exchanged.

    Rows are single conversations, cut to the budget where the plan has one. The plan has counted
    the pairs of the model's own `CostModel.windows`.

    Raises:
        UnsupportedModelError: the model cannot be patched.
    """
    cost = CostModel.of(model)
    budget = plan.overflow.max_tokens if plan.overflow else None
    largest = {way: min(size, budget or size) for way, size in plan.largest.items()}
    # a token's logits, and their gradient in fp32
    head = text_config(model).vocab_size * (model.dtype.itemsize + 4)
    saved = saved_bytes_per_token(model)
    activations = shared = None
    if saved is not None:
        activations = {way: round((saved + head) * size) for way, size in largest.items()}
    is_shared = sequence_parallel_size > 1
    of_shard = saved_bytes_per_token(model, sequence_parallel_size) if is_shared else None
    if of_shard is not None:
        pairs = -(-largest["single_pass"] // (2 * sequence_parallel_size))  # of tokens
        shared = round((of_shard + head) * 2 * pairs)
    return Estimate(
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=model.num_parameters(),
        npass_flops=cost.flops(plan.npass.work),
        one_render_flops=cost.flops(plan.one_render.work),
        single_pass_flops=cost.flops(plan.single_pass.work),
        speed_up=cost.speed_up(plan.npass.work, plan.single_pass.work),
        speed_up_over_one_render=cost.speed_up(plan.one_render.work, plan.single_pass.work),
        speed_up_by_tiles=cost.speed_up(plan.npass.tiled, plan.single_pass.tiled),
        bounded_layers=[
            BoundedLayers(
                *window,
                layers=cost.num_layers[window],
                npass_visible_pairs=plan.npass.work.bounded[window],
                single_pass_visible_pairs=plan.single_pass.work.bounded[window],
                npass_tiles=plan.npass.num_tiles(window),
                single_pass_tiles=plan.single_pass.num_tiles(window),
            )
            for window in cost.windows
        ],
        state_bytes=_COPIES * sum(p.numel() * p.element_size() for p in model.parameters()),
        saved_bytes_per_token=saved,
        activation_bytes=activations,
        sequence_parallel_size=sequence_parallel_size,
        shared_activation_bytes=shared,
    )
