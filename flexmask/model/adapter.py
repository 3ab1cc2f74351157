"""patch, unpatch, disabled: the drop-in for Hugging Face models.

A patched model takes `subtree_end` beside `position_ids`, and gives logits in packed order. Without it
the model does what it did before, so evaluation and `generate` need no change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from flexmask.backends.choice import BACKENDS
from flexmask.errors import DataError, UnsupportedModelError
from flexmask.loss import TreeLoss
from flexmask.model.families import check_family
from flexmask.model.tree_attention import STATE, PatchState, register, to_mask

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, *, backend: str = "auto") -> Model:
    """The same model, able to run packed trees: `model(input_ids, position_ids, subtree_end)`.

    Ordinary batches, without `subtree_end`, run as before. A second call replaces the first.

    Args:
        model: a Hugging Face causal language model of a verified family, or one wrapped by peft.
        backend: "auto", "reference", "cpu", "flex" or "triton", as in `attention`.

    Raises:
        UnsupportedModelError: single-pass training would not be exact, with the reason.
    """
    if backend not in ("auto", *BACKENDS):
        raise UnsupportedModelError(
            f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    if _is_patched(model):
        unpatch(model)
    top, decoder = _find_model(model)
    check_family(top)
    layers = _attention_layers(decoder)
    previous = top.config._attn_implementation
    name = register(previous)
    top.set_attn_implementation(name)
    if decoder.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(top).__name__} does not take an attention implementation; it cannot be patched"
        )
    state = PatchState(backend, previous, len(layers))
    for layer in layers:
        setattr(layer, STATE, state)
    top.loss_function = TreeLoss(top.loss_function)
    hooks = (
        decoder.register_forward_pre_hook(_take_tree, with_kwargs=True),
        decoder.register_forward_hook(_check_calls),
    )
    setattr(decoder, STATE, (state, hooks))
    return model


def unpatch(model: Model) -> Model:
    """The model as it was before `patch`; one that is not patched is left alone."""
    if not _is_patched(model):
        return model
    top, decoder = _find_model(model)
    state, hooks = getattr(decoder, STATE)
    for hook in hooks:
        hook.remove()
    delattr(decoder, STATE)
    for layer in _attention_layers(decoder):
        delattr(layer, STATE)
    top.loss_function = top.loss_function.original
    top.set_attn_implementation(state.previous)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A block in which a patched model is unpatched, and patched again after it.

    Run the backward pass of a tree batch before or after the block, not inside it.
    """
    if not _is_patched(model):
        yield
        return
    backend = getattr(_find_model(model)[1], STATE)[0].backend
    unpatch(model)
    try:
        yield
    finally:
        patch(model, backend=backend)


def _is_patched(model: nn.Module) -> bool:
    return hasattr(_find_model(model)[1], STATE)


def _find_model(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The Hugging Face model inside any wrappers, and its decoder stack."""
    top = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if top is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no Hugging Face model; load it with AutoModelForCausalLM"
        )
    decoder = top.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(f"{type(top).__name__} has no decoder stack of its own")
    return top, decoder


def _attention_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The modules that call the attention interface, one a layer."""
    layers = [m for m in decoder.modules() if type(m).__name__.endswith("Attention")]
    expected = decoder.config.num_hidden_layers
    if len(layers) != expected:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} must have one attention module a layer, {expected}, "
            f"got {len(layers)}"
        )
    return layers


def _take_tree(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the decoder runs: turn `subtree_end` into the mask that our attention knows."""
    state, _ = getattr(decoder, STATE)
    subtree_end = kwargs.pop("subtree_end", None)
    if not torch.compiler.is_compiling():
        state.num_calls = -1 if subtree_end is None else 0
    if subtree_end is None:
        return None
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        raise DataError("subtree_end needs position_ids, the depths of the tokens; give both")
    if position_ids.shape != subtree_end.shape:
        raise DataError(
            f"subtree_end must have the shape of position_ids, {list(position_ids.shape)}, "
            f"got {list(subtree_end.shape)}"
        )
    if kwargs.get("attention_mask") is not None:
        raise DataError("a tree batch takes no attention_mask; subtree_end is the whole mask")
    cache = kwargs.get("past_key_values")
    if cache is not None:
        raise DataError("a tree batch takes no past_key_values; run it in one piece")
    kwargs["attention_mask"] = to_mask(subtree_end, position_ids)
    kwargs["use_cache"] = False
    return args, kwargs


def _check_calls(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After the decoder ran: a layer that did not call our attention has ignored the tree."""
    state, _ = getattr(decoder, STATE)
    if torch.compiler.is_compiling() or state.num_calls < 0:
        return
    if state.num_calls != state.num_layers:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} ran its attention on the tree in {state.num_calls} of "
            f"{state.num_layers} layers; the others ignored the mask, and the result is wrong"
        )
