"""Which models are exact on a tree, and why the others are refused.

A family is listed once its packed logits and gradients have been shown equal to those of separate
sequences (`tests/test_model_families.py`), and its configuration is checked before each patch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.errors import UnsupportedModelError
from flexmask.model.structure import WITHOUT_ATTENTION, active_dropouts, find_decoder, text_config

_NO_WINDOW = "without sliding window"
_NO_AUXILIARY = "its auxiliary loss sees each token once, in N-pass once a sample"

# model_type -> what is worth knowing about the family.
FAMILIES = {
    "llama": "",
    "qwen2": _NO_WINDOW,
    "qwen2_moe": f"{_NO_WINDOW}; {_NO_AUXILIARY}",
    "qwen3": _NO_WINDOW,
    "qwen3_moe": f"{_NO_WINDOW}; {_NO_AUXILIARY}",
    "mistral": _NO_WINDOW,
    "mixtral": f"{_NO_WINDOW}; {_NO_AUXILIARY}",
    "ministral": _NO_WINDOW,
    "ministral3": _NO_WINDOW,
    "phi": "",
    "phi3": f"{_NO_WINDOW}; with longrope, samples up to original_max_position_embeddings",
    "phimoe": f"{_NO_WINDOW}; without jitter; {_NO_AUXILIARY}",
    "olmo": "",
    "olmo2": "",
    "olmo3": _NO_WINDOW,
    "olmoe": _NO_AUXILIARY,
    "flex_olmo": _NO_AUXILIARY,
    "glm": "",
    "glm4": "",
    "glm4_moe": "",
    "gemma": "",
    "gpt2": "",
    "gpt_neox": "",
    "granite": "",
    "granitemoe": _NO_AUXILIARY,
    "smollm3": _NO_WINDOW,
    "starcoder2": _NO_WINDOW,
    "seed_oss": "",
    "ernie4_5": "",
    "ernie4_5_moe": _NO_AUXILIARY,
    "hunyuan_v1_dense": "",
    "hunyuan_v1_moe": "",
    "minimax_m2": _NO_AUXILIARY,
    "apertus": "",
    "arcee": "",
    "afmoe": _NO_WINDOW,
    "cohere": "",
    "cwm": _NO_WINDOW,
    "exaone4": _NO_WINDOW,
    "helium": "",
    "stablelm": "",
    "qwen3_next": _NO_AUXILIARY,
    "qwen3_5_text": "",
    "qwen3_5_moe_text": _NO_AUXILIARY,
    "olmo_hybrid": "",
    "lfm2": "",
    "lfm2_moe": _NO_AUXILIARY,
    "jamba": _NO_AUXILIARY,
    "falcon_h1": "",
    "nemotron_h": _NO_AUXILIARY,
    "bamba": "",
    "granitemoehybrid": _NO_AUXILIARY,
}
VERSIONS = ("5.12.0", "5.23.0")  # of transformers, with which all of them have been verified
INSTALLED = transformers.__version__
# model_type -> the transformers it needs beyond the oldest that flexmask takes, and why.
NEEDS = {"nemotron_h": ("5.17.0", "older ones mix up the chunks of its scan without mamba_ssm")}

_WINDOWS = "it has sliding windows, which come with a later version"
_LATENT = "its multi-head latent attention comes with a later version"
_NO_INTERFACE = "it computes its attention outside the attention interface"

# model_type -> why single-pass training would not be exact, for families that people ask for.
REASONS = {
    "gpt_oss": "it has attention sinks and sliding windows, which come with a later version",
    "gemma2": "it has sliding windows and a softcap, which come with a later version",
    **dict.fromkeys(("gemma3_text", "gemma4_text", "cohere2"), _WINDOWS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _LATENT),
    "deepseek_v32": "an indexer chooses the keys of each query by their order in the row",
    "llama4_text": "it has attention chunks and a temperature by place in the row",
    "nemotron": "transformers 5.12 computes its attention outside the attention interface",
    **dict.fromkeys(("bloom", "falcon", "gptj"), _NO_INTERFACE),
}

# Rotary embeddings that depend on a token's own position only.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")

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


def check_family(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, unless the family is verified."""
    kind = config.model_type
    if kind not in FAMILIES:
        reason = REASONS.get(kind, "its family has not been verified")
        raise UnsupportedModelError(
            f"model_type {kind!r} cannot be patched: {reason}; docs/models.md lists those that can"
        )
    needed, reason = NEEDS.get(kind, ("0", ""))
    if Version(INSTALLED) < Version(needed):
        raise UnsupportedModelError(
            f"model_type {kind!r} cannot be patched with transformers {INSTALLED}: "
            f"{reason}; install {needed} or newer"
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


def _config_reasons(config: PreTrainedConfig) -> Iterator[str]:
    for name, value in vars(config).items():
        is_rate = _NOISE.search(name) and not _UNUSED_HEAD.match(name)
        if is_rate and isinstance(value, (int, float)) and value > 0:
            yield f"{name} must be 0, got {value}; N-pass would draw other noise, load it with 0"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if others := layer_types - {"full_attention", "attention", "hybrid", *WITHOUT_ATTENTION}:
        yield f"all layers must have full attention, got {', '.join(sorted(others))}"
    window = getattr(config, "sliding_window", None)
    if window and not layer_types and getattr(config, "use_sliding_window", True):
        yield f"sliding_window must be None, got {window}; windows come with a later version"
    for rope in _ropes(config):
        if rope["rope_type"] not in (*_STATIC_ROPE, "dynamic", "longrope"):
            yield f"its rotary embedding of type {rope['rope_type']!r} has not been verified"


def _model_reasons(model: nn.Module, top: PreTrainedModel) -> Iterator[str]:
    if top.get_output_embeddings() is None and find_decoder(top) is not top:
        yield f"{type(top).__name__} has another head than a language model's"
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
