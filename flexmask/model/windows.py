"""How far back each attention layer of a model sees, by its configuration.

The mask of a tree batch passes through the mask code of transformers unchanged, so the window or
chunk that this code would have drawn for a layer has to be told to our attention. Families choose
it in one of two ways, and the tests hold each to what its own code does.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.errors import UnsupportedModelError
from flexmask.model.structure import attention_kinds, attention_layers


class Window(NamedTuple):
    """What a query of one layer sees of its ancestors: `window` and `chunk` of a mask."""

    window: int | None = None
    chunk: int | None = None


FULL = Window()

# Families in which `sliding_window`, where it is not None, holds for every layer.
ONE_WINDOW = (
    *("mistral", "ministral3", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"),
    "minimax",
)

# Families in which `layer_types` says which layers have a window or a chunk.
BY_LAYER_TYPE = (
    *("qwen2", "qwen2_moe", "qwen3", "ministral", "smollm3", "olmo3", "afmoe", "cwm", "exaone4"),
    *("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "vaultgemma"),
    *("gpt_oss", "cohere2", "cohere2_moe", "llama4_text", "dots1", "exaone_moe", "laguna"),
    *("mellum", "granite_swa", "granitemoe_swa", "modernbert-decoder", "flint", "lfm3", "beam"),
    *("kolibri1", "mimo_v2_flash", "qwen2_vl_text", "qwen2_5_vl_text"),
    *("qwen2_5_omni_text", "muse_glimmer_text", "muse_spark_text", "step3p5"),
    *("cohere_compass_text", "zaya", "dory", "lara_mini"),
)

_FULL = ("full_attention", "attention", "hybrid")
_SIZES = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


def layer_windows(decoder: PreTrainedModel) -> list[Window]:
    """The window of each attention layer of a decoder stack, in the order of `attention_layers`.

    Raises:
        UnsupportedModelError: a window that the family is not known to have, or of no size.
    """
    kinds = attention_kinds(decoder.config)
    return [
        _window_of(decoder.config, kinds[index] if kinds else None)
        for index in range(len(attention_layers(decoder)))
    ]


def _window_of(config: PreTrainedConfig, kind: str | None) -> Window:
    family, window = config.model_type, getattr(config, "sliding_window", None)
    if family in ONE_WINDOW or not kind:
        is_off = family not in ONE_WINDOW and not getattr(config, "use_sliding_window", True)
        kind = "full_attention" if window is None or is_off else "sliding_attention"
    if kind in _FULL:
        return FULL
    if family not in (*ONE_WINDOW, *BY_LAYER_TYPE) or kind not in _SIZES:
        raise UnsupportedModelError(
            f"model_type {family!r} cannot be patched: layers of type {kind!r} have not been "
            "verified in it"
        )
    size = getattr(config, _SIZES[kind], None)
    if size is None or size < 1:
        raise UnsupportedModelError(
            f"model_type {family!r} cannot be patched: layers of type {kind!r} need "
            f"{_SIZES[kind]} to be at least 1, got {size}"
        )
    return Window(**{"chunk" if kind == "chunked_attention" else "window": size})
