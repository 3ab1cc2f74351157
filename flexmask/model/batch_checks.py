"""What is refused of a tree batch, and of what a model made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexmask.errors import DataError, UnsupportedModelError
from flexmask.model.structure import active_dropouts, find_decoder, find_model

# Names of inputs that stand for something else than text, or tell where that is.
_NOT_TEXT = re.compile(
    "pixel|image|video|audio|input_features|input_values|encoder_outputs|token_type"
)


def check_inputs(kwargs: Mapping[str, Any]) -> None:
    """Raise DataError for an argument of a model that goes with no tree batch."""
    if kwargs.get("attention_mask") is not None:
        raise DataError("a tree batch takes no attention_mask; subtree_end is the whole mask")
    for name in ("past_key_values", "cache"):  # its name since transformers 5.24
        if kwargs.get(name) is not None:
            raise DataError(f"a tree batch takes no {name}; run it in one piece")
    if kwargs.get("output_attentions"):
        raise DataError("a tree batch has no attention weights; leave out output_attentions")
    for name, value in kwargs.items():
        if value is not None and _NOT_TEXT.search(name):
            raise DataError(f"a tree batch is of text only, got {name}; leave it out")


def check_shapes(subtree_end: Tensor, position_ids: Tensor, inputs: Any) -> None:
    """Raise DataError unless all are [B, L]; embeddings have a third dimension."""
    shape = list(subtree_end.shape)
    if len(shape) != 2 or list(position_ids.shape) != shape:
        raise DataError(
            "subtree_end and position_ids must have the same shape [B, L], "
            f"got {shape} and {list(position_ids.shape)}"
        )
    if isinstance(inputs, Tensor) and list(inputs.shape[:2]) != shape:
        raise DataError(
            f"subtree_end must be [B, L] = {list(inputs.shape[:2])} like the inputs, got {shape}"
        )


def check_length(position_ids: Tensor, max_length: int) -> None:
    """Raise if a sample is so long that the rotary embedding changes for the whole batch."""
    fits = position_ids.max() < max_length
    message = (
        f"samples must have at most {max_length} tokens: beyond that the rotary embedding of this "
        "model depends on the longest sample of the batch"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(fits, message)
    elif not fits:
        raise DataError(f"{message}, got {int(position_ids.max()) + 1}")


def check_noise(module: nn.Module) -> None:
    """Raise if a part draws noise in training; it may have been turned on after `patch`."""
    for name, p in active_dropouts(module):
        raise UnsupportedModelError(f"dropout must be 0, got {p} in {name}; N-pass drops others")
    for part in module.modules():
        alpha = getattr(part, "neftune_noise_alpha", None)
        if alpha:
            raise UnsupportedModelError(
                f"neftune_noise_alpha must be 0, got {alpha}; N-pass would draw other noise"
            )


def check_auxiliary_gradient(module: nn.Module, output: Any) -> None:
    """Raise UnsupportedModelError if the auxiliary loss of experts would train nothing."""
    loss = getattr(output, "aux_loss", None)
    is_trained = any(
        weight.requires_grad for weight in find_decoder(find_model(module)).parameters()
    )
    if is_trained and isinstance(loss, Tensor) and not loss.requires_grad:
        raise UnsupportedModelError(
            "the auxiliary loss of experts has no gradient, as reentrant checkpointing keeps none "
            "of router logits; give gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def check_own_loss(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if a model that calls no loss function ignored a part of a batch.

    Some classes compute their loss in their forward; Liger and TRL replace that by one which does.
    """
    name = type(find_model(module)).__name__
    if kwargs.get("loss_weights") is not None:
        raise UnsupportedModelError(
            f"{name} computed its loss without loss_weights; where a fused loss "
            "has replaced its loss function, turn it off"
        )
    if kwargs.get("shift_labels") is None:
        return
    forward: Any = find_model(module).forward
    names: set[Any] = set()  # of arguments and of keys; a variable may be made from the labels
    while forward is not None:
        if code := getattr(forward, "__code__", None):
            names.update(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
            names.update(code.co_consts)
        forward = getattr(forward, "__wrapped__", None)
    if "shift_labels" not in names:
        raise UnsupportedModelError(
            f"{name} computed its loss by itself, without shift_labels, and so shifted labels a "
            "second time; take a newer version of transformers, or of the fused loss that has "
            "replaced its own, turn that off, or leave out labels for a loss of your own"
        )
