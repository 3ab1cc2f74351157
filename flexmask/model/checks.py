"""What a model must be, beside its family, for trees to be exact on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flexmask.errors import DataError, UnsupportedModelError
from flexmask.model.families import check_family
from flexmask.model.mixers.kinds import MIXERS, find_mixers
from flexmask.model.structure import active_dropouts, find_decoder, find_head, text_config
from flexmask.model.windows import layer_windows

# Rotary embeddings that depend on a token's own position only.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")

_CAPPED = ("gemma2", "vaultgemma")  # hand their softcap to the attention, where sdpa drops it

# Names of rates of noise, and those in heads that a causal language model does not have.
_NOISE = re.compile("drop|jitter")
_UNUSED_HEAD = re.compile("classifier|summary")


def check_model(model: nn.Module, top: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, unless trees are exact on a model.

    Args:
        model: the model with its wrappers.
        top: the Hugging Face model inside them.
    """
    config = text_config(top)
    check_family(config)
    for reason in (*_config_reasons(config), *_model_reasons(model, top)):
        raise UnsupportedModelError(f"model_type {config.model_type!r} cannot be patched: {reason}")
    layer_windows(find_decoder(top))


def check_vocabulary(size: int, input_ids: Iterable[np.ndarray]) -> None:
    """Raise DataError if a token id is beyond the vocabulary of a model, of `size` tokens."""
    highest = max((int(ids.max()) for ids in input_ids), default=0)
    if highest >= size:
        raise DataError(
            f"token id {highest} must be below the model's vocab_size of {size}; "
            "the tokenizer belongs to another model"
        )


def check_parallelism(parallelism: Any) -> None:
    """Raise UnsupportedModelError if a row would be cut between processes.

    Args:
        parallelism: accelerate's `ParallelismConfig`, or None.
    """
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, None) or 1
        if size > 1:
            raise UnsupportedModelError(
                f"ParallelismConfig: {name} must be 1, got {size}; it cuts rows between processes, "
                "in which a tree would lose its mask. patch(model, sequence_group=...) cuts them "
                "exactly; or take rows that fit one device (max_tokens)"
            )


def check_sequence_group(top: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if tokens of a row cannot be cut over ranks exactly."""
    family = text_config(top).model_type
    for mixer in find_mixers(find_decoder(top)):
        raise UnsupportedModelError(
            f"model_type {family!r} takes no sequence_group: its {type(mixer).__name__} looks "
            "along the sequence, and each process has a part of it; take rows that fit one device"
        )
    if top is not find_decoder(top) and top.loss_function is not ForCausalLMLoss:
        raise UnsupportedModelError(
            f"the loss function of {type(top).__name__} must be ForCausalLMLoss with a "
            f"sequence_group, got {top.loss_function!r}, which need not be a sum over tokens"
        )


def max_exact_length(config: PreTrainedConfig) -> int | None:
    """The longest sample for which the rotary embedding depends on each token alone, or None.

    The types "dynamic" and "longrope" change the frequencies of a whole batch when its longest
    sequence passes a limit, so that a token's embedding depends on what comes after it.
    """
    limits = []
    for rope in _ropes(config):
        if rope["rope_type"] == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif rope["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings - 1)
    return min(limits, default=None)


def exact_attention(config: PreTrainedConfig) -> dict[str, str]:
    """What to load a model with, so that its own attention leaves out nothing; mostly nothing."""
    text = config.get_text_config(decoder=True)
    is_capped = text.model_type in _CAPPED and text.attn_logit_softcapping is not None
    return {"attn_implementation": "eager"} if is_capped else {}


def _config_reasons(config: PreTrainedConfig) -> Iterator[str]:
    for name, value in vars(config).items():
        is_rate = _NOISE.search(name) and not _UNUSED_HEAD.match(name)
        if is_rate and isinstance(value, (int, float)) and value > 0:
            yield f"{name} must be 0, got {value}; N-pass would draw other noise, load it with 0"
    if config.model_type == "zaya" and config.attention_bias:
        yield f"attention_bias must be off, got {config.attention_bias!r}; paths begin with zeros"
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if bidirectional and bidirectional != "vision":  # that of gemma4: between images' tokens only
        yield f"use_bidirectional_attention must be off, got {bidirectional!r}"
    if exact_attention(config) and config._attn_implementation == "sdpa":
        yield (
            "its own attention, 'sdpa', leaves out attn_logit_softcapping = "
            f"{config.attn_logit_softcapping}; load it with attn_implementation='eager'"
        )
    for rope in _ropes(config):
        if rope["rope_type"] not in (*_STATIC_ROPE, "dynamic", "longrope"):
            yield f"its rotary embedding of type {rope['rope_type']!r} has not been verified"


def _model_reasons(model: nn.Module, top: PreTrainedModel) -> Iterator[str]:
    decoder = find_decoder(top)
    if find_head(top) is None and decoder is not top:
        yield f"{type(top).__name__} has another head than a language model's"
    if decoder.config.model_type not in MIXERS:
        for mixer in find_mixers(decoder):
            yield f"its {type(mixer).__name__} looks along the sequence, and has not been verified"
    for name, p in active_dropouts(model):
        yield f"dropout must be 0, got {p} in {name}; N-pass would drop others"
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            yield f"{adapter.peft_type.value} puts virtual tokens before the row; use LoRA"


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary embeddings of a config, of which some have one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and "rope_type" in rope:
            yield rope
