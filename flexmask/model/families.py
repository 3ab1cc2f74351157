"""Which models are exact on a tree, and why the others are refused.

A family is listed once its packed logits and gradients have been shown equal to those of separate
sequences (`tests/test_model_families.py`), and its configuration is checked before each patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from flexmask.errors import UnsupportedModelError

# model_type -> what is worth knowing about the family.
FAMILIES = {
    "llama": "",
    "qwen2": "without sliding window",
    "qwen3": "without sliding window",
    "mistral": "without sliding window",
    "phi3": "without sliding window and longrope",
    "olmo2": "",
    "glm": "",
    "glm4": "",
    "smollm3": "without sliding window",
    "granite": "",
    "starcoder2": "without sliding window",
    "seed_oss": "",
    "ernie4_5": "",
    "hunyuan_v1_dense": "",
    "arcee": "",
    "olmo": "",
    "gemma": "",
    "cohere": "",
    "helium": "",
}

# model_type -> why single-pass training would not be exact, for families that people ask for.
REASONS = {
    "gpt_oss": "it has attention sinks and sliding windows",
    "gemma2": "it has sliding windows and a softcap",
    "gemma3": "it has sliding windows",
    "gemma3_text": "it has sliding windows",
    "deepseek_v3": "it has different key and value widths",
    "qwen3_next": "it has recurrent layers",
    "qwen3_5": "it has recurrent layers",
    "qwen3_5_text": "it has recurrent layers",
    "lfm2": "it has convolutional layers",
    "jamba": "it has recurrent layers",
    "falcon_h1": "it has recurrent layers",
    "nemotron_h": "it has recurrent layers",
    "llama4_text": "it has attention chunks and a temperature by physical position",
}

# Probabilities of dropping attention weights, and of dropping anything else.
_DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
    *("resid_pdrop", "embd_pdrop", "hidden_dropout", "residual_dropout", "embedding_dropout"),
)
# Rotary embeddings whose frequencies depend on the longest position of the batch.
_DYNAMIC_ROPE = ("dynamic", "longrope")


def check_family(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, unless trees are exact on `model`."""
    config = model.config.get_text_config()
    kind = config.model_type
    if kind not in FAMILIES:
        reason = REASONS.get(kind, "its family has not been verified")
        raise UnsupportedModelError(
            f"model_type {kind!r} cannot be patched: {reason}; verified are {', '.join(FAMILIES)}"
        )
    for reason in _config_reasons(config):
        raise UnsupportedModelError(f"model_type {kind!r} cannot be patched: {reason}")


def _config_reasons(config: PretrainedConfig) -> Iterable[str]:
    for name in _DROPOUTS:
        if value := getattr(config, name, 0):
            yield f"{name} must be 0, got {value}; N-pass would draw other masks"
    layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layer_types:
        yield f"all layers must have full attention, got {', '.join(sorted(layer_types))}"
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        yield f"sliding_window must be None, got {config.sliding_window}"
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in _DYNAMIC_ROPE:
            yield (
                f"its rotary embedding of type {rope_type!r} depends on the longest sequence of "
                "the batch, which is not that of each sample"
            )


def _rope_types(parameters: Any) -> Iterable[str]:
    """The rope types of a config, of which some have one for each type of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters["rope_type"]
    for nested in parameters.values():
        yield from _rope_types(nested)
