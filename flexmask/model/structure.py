"""The parts of a Hugging Face model that a patch is put on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.errors import UnsupportedModelError
from flexmask.model.mixers.kinds import MIXERS, find_mixers

# Types of layers, as configurations of families in MIXERS name them, that have no attention.
WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "mlp", "moe")

# Part of the names of experts that only tokens of images meet, as in Ernie 4.5.
FOR_IMAGES = ".vision_moe."


def find_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside any wrappers, such as those of peft and DDP.

    Raises:
        UnsupportedModelError: there is none.
    """
    if not isinstance(model, nn.Module):
        is_plain = model is None or isinstance(model, str)
        given = repr(model) if is_plain else f"a {type(model).__name__}"
        raise UnsupportedModelError(
            f"flexmask takes a model, got {given}; "
            "load one with AutoModelForCausalLM.from_pretrained"
        )
    top = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if top is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no Hugging Face model; load it with AutoModelForCausalLM"
        )
    return top


def find_decoder(top: PreTrainedModel) -> PreTrainedModel:
    """The decoder stack of `top`: the innermost model with the text configuration; maybe `top`.

    Raises:
        UnsupportedModelError: no part of `top` has its text configuration.
    """
    config = text_config(top)
    stacks = [m for m in top.modules() if isinstance(m, PreTrainedModel) and m.config is config]
    if not stacks:
        raise UnsupportedModelError(f"{type(top).__name__} has no decoder stack of its own")
    return stacks[-1]


def is_wrapped(top: PreTrainedModel, decoder: PreTrainedModel) -> bool:
    """Whether another model, such as one for images too, lies between `top` and its decoder."""
    return len(_models_around(top, decoder)) > 2


def find_head(top: PreTrainedModel) -> nn.Module | None:
    """The head of a language model, or None.

    It is that of `top`, or stands in a model inside `top`, if `top` itself computes the loss.
    """
    has_loss = "loss_function" in inspect.unwrap(type(top).forward).__code__.co_names
    models = _models_around(top, find_decoder(top)) if has_loss else [top]
    heads = (model.get_output_embeddings() for model in models)
    return next((head for head in heads if head is not None), None)


def _models_around(top: PreTrainedModel, decoder: PreTrainedModel) -> list[PreTrainedModel]:
    models = [m for m in top.modules() if isinstance(m, PreTrainedModel)]
    return [m for m in models if any(part is decoder for part in m.modules())]


def unreached_parameters(top: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The parameters of a model for images too that text does not reach, such as its vision tower.

    A step on text gives them no gradient, which DistributedDataParallel takes for an error.
    """
    decoder = find_decoder(top)
    if sum(isinstance(part, PreTrainedModel) for part in top.modules()) > 2:
        head = find_head(top)
        reached = {*decoder.parameters(), *(head.parameters() if head is not None else ())}
        reached -= {w for name, w in decoder.named_parameters() if FOR_IMAGES in name}
        yield from (weight for weight in top.parameters() if weight not in reached)


def text_config(top: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the decoder stack of `top`."""
    return top.config.get_text_config(decoder=True)


def attention_kinds(config: PreTrainedConfig) -> list[str]:
    """The types of the layers that have an attention, in order; empty where there are no types."""
    types = getattr(config, "layer_types", None) or []
    if config.model_type not in MIXERS:
        return list(types)
    return [kind for kind in types if kind not in WITHOUT_ATTENTION]


def attention_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The modules that call the attention interface, in the order of the layers that have one.

    Raises:
        UnsupportedModelError: the stack is built in some other way.
    """
    if not decoder._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(decoder).__name__} computes its attention outside the attention interface of "
            "transformers; it cannot be patched"
        )
    mixers = find_mixers(decoder)  # of which some are called attention too
    layers = [
        module
        for module in decoder.modules()
        if type(module).__name__.endswith("Attention") and module not in mixers
    ]
    types = getattr(decoder.config, "layer_types", None) or []
    without = len(types) - len(attention_kinds(decoder.config))
    expected = decoder.config.num_hidden_layers - without
    if len(layers) != expected:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} must have one attention module in each of {expected} "
            f"layers, got {len(layers)}; it cannot be patched"
        )
    for layer in layers:
        if not isinstance(layer.__dict__.get("config"), PreTrainedConfig):
            raise UnsupportedModelError(
                f"{type(layer).__name__} does not choose its attention by its configuration; "
                "it cannot be patched"
            )
    return layers


def mask_names(decoder: PreTrainedModel) -> tuple[str, ...]:
    """The types of layers by which a stack of several takes its masks, a dict of them.

    Empty for a stack that takes one mask and hands it to all layers, as in transformers 5.12.
    """
    names = inspect.unwrap(type(decoder).forward).__code__.co_names
    if not {"isinstance", "dict"} <= set(names):  # it asks whether its mask is one
        return ()
    full, sliding = ("full_attention", "hybrid"), ("sliding_attention", "hybrid_sliding")
    return (*full, *sliding, "linear_attention", "conv")


def active_dropouts(model: nn.Module) -> Iterator[tuple[str, float]]:
    """The name and probability of each dropout module that would drop something."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield name, module.p
