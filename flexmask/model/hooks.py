"""What a patched model does around its forward pass.

The outermost module checks the batch before and, after, that nothing of it was ignored. The decoder
stack turns `subtree_end` into the mask that our attention knows, wherever it is called from.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from flexmask.errors import DataError, UnsupportedModelError
from flexmask.model.batch_checks import (
    check_auxiliary_gradient,
    check_inputs,
    check_length,
    check_noise,
    check_own_loss,
    check_shapes,
)
from flexmask.model.checks import check_parallelism
from flexmask.model.experts import has_auxiliary_loss, take_counts
from flexmask.model.loss import TreeLoss
from flexmask.model.mixers.forward import MixerForward
from flexmask.model.sequence_group import SequenceGroup
from flexmask.model.structure import find_head, find_model
from flexmask.model.tree_attention import STATE, LayerPatch, is_tree, to_mask
from flexmask.tree.mask import TreeMask

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class ModelPatch:
    """What is known of one patched model; its outermost module and its decoder stack hold it.

    Attributes:
        layers: of its attention modules, and of its recurrent and convolutional ones.
        mask_names: the names under which its decoder stack takes masks; empty if it takes one.
        backend: the attention backend for trees.
        is_wrapped: whether a model of several kinds of input lies around the decoder stack, and
            hands it masks of its own making.
        max_length: longest sample for which its rotary embedding is that of N-pass, None if any.
        loss: its loss function, None for a model without a head.
        config: of its decoder stack.
        sequence_group: of the ranks over which its tokens are cut, or None.
        handles: of its hooks.
        is_disabled: whether tree batches are refused for now.
        is_counted: whether the batch at hand has its `sample_counts` for an attention mask.
        checks_positions: whether positions have to be those that the mask says; see `wrong_masks`.
    """

    layers: list[LayerPatch | MixerForward]
    mask_names: tuple[str, ...]
    backend: str
    is_wrapped: bool
    max_length: int | None
    loss: TreeLoss | None
    config: PreTrainedConfig
    sequence_group: SequenceGroup | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    is_disabled: bool = False
    is_counted: bool = False
    checks_positions: bool = True


def check_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Before the outermost module runs: the batch as it takes it.

    `sample_counts` are taken out, and stand for the attention mask where experts have an auxiliary
    loss; `take_tree` puts the mask in their place.

    Raises:
        DataError: the batch cannot be right.
    """
    patch: ModelPatch = getattr(module, STATE)
    is_tree_batch = kwargs.get("subtree_end") is not None
    counts = kwargs.pop("sample_counts", None)
    if is_tree_batch and patch.is_disabled:
        raise DataError("flexmask is disabled for this model; run tree batches outside `disabled`")
    if is_tree_batch:
        check_inputs(kwargs)
        if not torch.compiler.is_compiling():
            check_parallelism(_accelerate_parallelism())
        if patch.is_wrapped:  # some models around a decoder stack make its cache
            kwargs["use_cache"] = False
    for layer in patch.layers:
        layer.was_called = False
    if is_tree_batch and module.training and not torch.compiler.is_compiling():
        check_noise(module)
    for name in ("loss_weights", "shift_labels"):
        if kwargs.get(name) is not None and kwargs.get("labels") is None:
            raise DataError(
                f"{name} need labels, or the model computes no loss; leave them out for a loss of "
                "your own (a Trainer's label_smoothing_factor must be 0: it shifts labels again)"
            )
    if patch.loss is not None:
        patch.loss.expect(is_tree_batch, kwargs)
    has_head = patch.loss is not None
    patch.is_counted = is_tree_batch and has_head and has_auxiliary_loss(patch.config, kwargs)
    if patch.is_counted:
        patch.is_counted = take_counts(kwargs, counts)
    return args, kwargs


def check_result(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """After a module ran: raise UnsupportedModelError if part of a tree batch was ignored."""
    patch: ModelPatch = getattr(module, STATE)
    if kwargs.get("subtree_end") is not None or _holds_tree(kwargs.get("attention_mask")):
        num_called = sum(layer.was_called for layer in patch.layers)
        if num_called != len(patch.layers):
            raise UnsupportedModelError(
                f"{type(module).__name__} ran on the tree in {num_called} of {len(patch.layers)} "
                "layers; the others ignored the mask, and the result is wrong"
            )
    if kwargs.get("subtree_end") is not None and torch.is_grad_enabled():
        check_auxiliary_gradient(module, output)
    if kwargs.get("labels") is None or (patch.loss is not None and patch.loss.was_called):
        return
    if patch.sequence_group and kwargs.get("subtree_end") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} computed its loss by a fused one, of a part of the row; turn "
            "it off (use_liger_kernel) with a sequence_group"
        )
    if patch.loss is None or find_head(find_model(module)) is not None:
        check_own_loss(module, kwargs)  # a decoder stack in a model with a head computes none


def take_tree(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Before the decoder stack runs: turn `subtree_end` into an attention mask."""
    patch: ModelPatch = getattr(decoder, STATE)
    subtree_end = kwargs.pop("subtree_end", None)
    kwargs.pop("sample_counts", None)
    if subtree_end is None:
        return None
    if patch.is_counted:  # once: the next call of the stack may come from elsewhere
        patch.is_counted, kwargs["attention_mask"] = False, None
    for layer in patch.layers:
        layer.was_called = False
    if len(args) > 1:
        raise DataError("a tree batch takes keyword arguments; name all but input_ids")
    position_ids = kwargs.get("position_ids")
    embeds = kwargs.get("inputs_embeds")
    ids = args[0] if args else kwargs.get("input_ids")
    if position_ids is None:
        raise DataError(
            "subtree_end needs position_ids, the depth of each token; they are not 0, 1, 2, ..., "
            "take both from TreeCollator or PackedRow.to_batch"
        )
    check_shapes(subtree_end, position_ids, ids if embeds is None else embeds)
    if not (patch.is_wrapped and isinstance(kwargs.get("attention_mask"), dict)):
        check_inputs(kwargs)
    if patch.max_length is not None:
        check_length(position_ids, patch.max_length)
    if subtree_end.device.type == "cpu" and not torch.compiler.is_compiling():
        # Raises unless these are the subtree ends and depths of a forest.
        TreeMask(subtree_end, position_ids if patch.checks_positions else None)
    mask = to_mask(subtree_end, position_ids)
    if patch.sequence_group:
        args, kwargs = _cut_inputs(patch.sequence_group, args, kwargs, subtree_end)
    kwargs["attention_mask"] = dict.fromkeys(patch.mask_names, mask) if patch.mask_names else mask
    kwargs["use_cache"] = False
    return args, kwargs


def gather_router_logits(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """After the decoder stack ran on a part of each row: hand its model those of whole rows.

    From them it computes the auxiliary loss of experts, which is no sum over tokens.
    """
    patch: ModelPatch = getattr(decoder, STATE)
    logits = getattr(output, "router_logits", None)
    if patch.sequence_group and logits and _holds_tree(kwargs.get("attention_mask")):
        mask: Any = kwargs["attention_mask"]
        output.router_logits = tuple(
            patch.sequence_group.gather(x.unflatten(0, (mask.shape[0], -1))).flatten(0, 1)
            for x in logits
        )


def _cut_inputs(
    ranks: SequenceGroup, args: tuple[Any, ...], kwargs: dict[str, Any], subtree_end: Tensor
) -> Arguments:
    """The inputs of the decoder stack with the tokens of this rank alone."""
    if not torch.compiler.is_compiling():
        ids = args[0] if args else kwargs.get("input_ids")
        given = (subtree_end, kwargs["position_ids"], ids)
        ranks.check_same(*(x for x in given if x is not None))
    for name in ("input_ids", "inputs_embeds", "position_ids", "per_layer_inputs"):
        if kwargs.get(name) is not None:
            kwargs[name] = ranks.cut(kwargs[name])
    return tuple(ranks.cut(x) for x in args), kwargs


def _holds_tree(attention_mask: Any) -> bool:
    if isinstance(attention_mask, dict):
        return any(is_tree(mask) for mask in attention_mask.values())
    return is_tree(attention_mask)


def _accelerate_parallelism() -> Any:
    """The `ParallelismConfig` that accelerate was set up with, or None."""
    state = sys.modules.get("accelerate.state")
    return state and state.AcceleratorState._shared_state.get("parallelism_config")
