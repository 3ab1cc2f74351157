"""patch, unpatch, disabled: the drop-in for Hugging Face models.

A patched model takes `subtree_end` beside `position_ids`, and gives logits in packed order. Without
it the model does what it did before, so evaluation and `generate` need no change: the attention
modules alone are given a configuration that names our attention, the model's own stays as it is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.backends.choice import BACKENDS
from flexmask.backends.flex_options import check_kernel_options
from flexmask.errors import UnsupportedModelError
from flexmask.model.checks import check_model, check_sequence_group, max_exact_length
from flexmask.model.hooks import (
    ModelPatch,
    check_batch,
    check_result,
    gather_router_logits,
    take_tree,
)
from flexmask.model.loss import TreeLoss
from flexmask.model.mixers.forward import MixerForward
from flexmask.model.mixers.kinds import MIXERS, find_mixers
from flexmask.model.sequence_group import SequenceGroup
from flexmask.model.structure import (
    attention_layers,
    find_decoder,
    find_model,
    is_wrapped,
    mask_names,
    text_config,
)
from flexmask.model.temperature import temperature_of
from flexmask.model.tree_attention import NAME, STATE, AttentionFunction, LayerPatch
from flexmask.model.windows import Window, layer_windows

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    backend: str = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    sequence_group: Any = None,
) -> Model:
    """The same model, able to run packed trees: `model(input_ids, position_ids, subtree_end)`.

    Ordinary batches, without `subtree_end`, run as before. A second call replaces the first.

    Args:
        model: a Hugging Face causal language model of a verified family, or one wrapped by peft.
        backend: "auto", "reference", "cpu", "varlen", "flex" or "triton", as in `attention`.
        kernel_options: FlexAttention's own, such as {"BLOCK_M": 64}, with backend="flex".
        sequence_group: the process group whose n ranks share the tokens of a row, or None. Each is
            given the same batch, of whole rows of a multiple of 2n tokens, holds activations of L/n
            of them, and returns the loss of all, with logits of its own. Gradients are to be
            averaged over the ranks, as DDP and FSDP do.

    Raises:
        UnsupportedModelError: single-pass training would not be exact, with the reason.
    """
    if backend not in ("auto", *BACKENDS):
        raise UnsupportedModelError(
            f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    check_kernel_options(kernel_options, backend)
    top = find_model(model)
    check_model(model, top)
    unpatch(model)
    decoder = find_decoder(top)
    layers = attention_layers(decoder)
    mixers = find_mixers(decoder)
    ranks = None if sequence_group is None else SequenceGroup.of(sequence_group)
    if ranks is not None:
        check_sequence_group(top)
    state = ModelPatch(
        layers=[
            *(
                _patch_layer(layer, backend, window, kernel_options, ranks)
                for layer, window in zip(layers, layer_windows(decoder), strict=True)
            ),
            *(_patch_mixer(mixer, text_config(top)) for mixer in mixers),
        ],
        mask_names=mask_names(decoder) if mixers else (),
        backend=backend,
        is_wrapped=is_wrapped(top, decoder),
        max_length=max_exact_length(text_config(top)),
        loss=None if top is decoder else _patch_loss(top, ranks),
        config=text_config(top),
        sequence_group=ranks,
    )
    modules: set[nn.Module] = {model, decoder}
    for module in modules:
        setattr(module, STATE, state)
        state.handles.append(module.register_forward_hook(check_result, with_kwargs=True))
    state.handles.append(model.register_forward_pre_hook(check_batch, with_kwargs=True))
    state.handles.append(decoder.register_forward_pre_hook(take_tree, with_kwargs=True))
    if ranks is not None:
        state.handles.append(decoder.register_forward_hook(gather_router_logits, with_kwargs=True))
    return model


def unpatch(model: Model) -> Model:
    """The model as it was before `patch`; one that is not patched is left alone."""
    state = _state_of(model)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    top = find_model(model)
    decoder = find_decoder(top)
    for layer in attention_layers(decoder):
        layer.config = getattr(layer, STATE).config
        delattr(layer, STATE)
    for mixer in find_mixers(decoder):
        _restore_mixer(mixer)
    if state.loss is not None:
        _restore_loss(top, state.loss)
    for module in model.modules():
        if module.__dict__.get(STATE) is state:
            delattr(module, STATE)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A block in which a patched model takes ordinary batches only; tree batches are refused."""
    state = _state_of(model)
    if state is None:
        yield
        return
    before, state.is_disabled = state.is_disabled, True
    try:
        yield
    finally:
        state.is_disabled = before


@contextmanager
def wrong_masks(model: nn.Module) -> Iterator[None]:
    """A block in which positions may contradict the mask: for controls, which must come out wrong.

    The mask alone is then wrong, not the positions with it.
    """
    state = _state_of(model)
    assert state is not None, "a control runs on a patched model"
    before, state.checks_positions = state.checks_positions, False
    try:
        yield
    finally:
        state.checks_positions = before


def is_patched(model: nn.Module) -> bool:
    """Whether a model takes tree batches, or would if it were not `disabled`."""
    return _state_of(model) is not None


def requested_backend(model: nn.Module) -> str:
    """The `backend` that a patched model was given."""
    state = _state_of(model)
    assert state is not None, "only a patched model has a backend"
    return state.backend


def sequence_group_of(model: nn.Module) -> SequenceGroup | None:
    """The ranks among which a patched model shares the tokens of a row, or None."""
    state = _state_of(model)
    return None if state is None else state.sequence_group


def _state_of(model: nn.Module) -> ModelPatch | None:
    return find_decoder(find_model(model)).__dict__.get(STATE)


def _patch_layer(
    layer: nn.Module,
    backend: str,
    window: Window,
    kernel_options: Mapping[str, Any] | None,
    ranks: SequenceGroup | None,
) -> LayerPatch:
    """Give an attention module a configuration that names our attention."""
    config: PreTrainedConfig = layer.__dict__["config"]
    own = backend, window, temperature_of(layer), kernel_options, ranks
    state = LayerPatch(config, _eager_attention(layer), *own)
    copied: PreTrainedConfig = copy.copy(config)
    copied._attn_implementation = {"": NAME}  # of this configuration, not of any inside it
    setattr(layer, "config", copied)  # noqa: B010 - mypy takes every attribute for a module
    setattr(layer, STATE, state)
    return state


def _patch_mixer(mixer: nn.Module, config: PreTrainedConfig) -> MixerForward:
    """Put a forward pass that knows trees in front of a recurrent or convolutional layer's own."""
    state = MixerForward(mixer, MIXERS[config.model_type].functions)
    setattr(mixer, STATE, state)
    setattr(mixer, "forward", state)  # noqa: B010 - mypy takes every attribute for a module
    return state


def _restore_mixer(mixer: nn.Module) -> None:
    """Give a layer its own forward pass back, unless it has been given another one since."""
    state: MixerForward = mixer.__dict__.pop(STATE)
    if mixer.__dict__.get("forward") is state:
        del mixer.__dict__["forward"]
        if state.replaced is not None:
            mixer.__dict__["forward"] = state.replaced


def _eager_attention(layer: nn.Module) -> AttentionFunction:
    """What the name "eager" stands for in the file that defines an attention module."""
    for kind in type(layer).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no eager attention beside it; it cannot be patched"
    )


def _patch_loss(top: PreTrainedModel, ranks: SequenceGroup | None) -> TreeLoss:
    """Put a loss that knows trees in front of the model's own.

    Models of images say that they take no `num_items_in_batch`, as images change their labels; a
    Trainer would then weigh every batch of a step the same. With text alone theirs is exact.
    """
    is_own = "_loss_function" in top.__dict__
    loss = TreeLoss(top.loss_function, is_own=is_own, sequence_group=ranks)
    top.loss_function = loss
    setattr(top, "accepts_loss_kwargs", True)  # noqa: B010 - mypy takes it for a module
    return loss


def _restore_loss(top: PreTrainedModel, loss: TreeLoss) -> None:
    """Give a model its own loss function back, unless it has been given another one since."""
    top.__dict__.pop("accepts_loss_kwargs", None)
    if top.__dict__.get("_loss_function") is loss:
        del top._loss_function
        if loss.is_own:
            top.loss_function = loss.original
