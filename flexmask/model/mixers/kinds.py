"""Which families have recurrent or convolutional layers, and how these run on a tree."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import nn


class Mixer(NamedTuple):
    """A kind of recurrent or convolutional layer.

    Attributes:
        functions: what it calls to look along the sequence, see `OVER_A_TREE`; none where it
            writes that out, see `LAYERS_OVER_A_TREE`.
        way: how it runs on a tree, for the documentation.
    """

    functions: tuple[str, ...]
    way: str


_CONVOLUTION = Mixer(("causal_conv1d_fn",), "convolution over chains")
_GATED_DELTA = Mixer(
    ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"), "states handed to branches"
)
_KIMI_DELTA = Mixer(("causal_conv1d_fn", "chunk_kimi_delta_attention"), "states handed to branches")
_MAMBA2 = Mixer(("causal_conv1d_fn", "mamba2_chunk_scan"), "states handed to branches")
_MAMBA = Mixer(
    ("causal_conv1d_fn", "mamba_selective_scan"), "scan on unrolled paths, all else once a token"
)
_LIGHTNING = Mixer((), "states handed to branches")
_COMPRESSED = Mixer((), "convolution over chains")

# model_type -> the kind of its layers that are not attention.
MIXERS = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _GATED_DELTA),
    **dict.fromkeys(("olmo_hybrid", "lara_mini"), _GATED_DELTA),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), _KIMI_DELTA),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLUTION),
    **dict.fromkeys(("falcon_h1", "nemotron_h", "bamba", "granitemoehybrid"), _MAMBA2),
    "zamba2": _MAMBA2,
    **dict.fromkeys(("jamba", "zamba"), _MAMBA),
    "minimax": _LIGHTNING,
    "zaya": _COMPRESSED,
}
# Layers that look along the sequence without a convolution.
WITHOUT_CONVOLUTION = ("MiniMaxLightningAttention",)


def find_mixers(decoder: nn.Module) -> list[nn.Module]:
    """The recurrent and convolutional layers of a stack: most of them hold a convolution."""
    return [module for module in decoder.modules() if _is_mixer(module)]


def _is_mixer(module: nn.Module) -> bool:
    if type(module).__name__ in WITHOUT_CONVOLUTION:
        return True
    takes_states = "hidden_states" in inspect.signature(module.forward).parameters
    return takes_states and any(isinstance(child, nn.Conv1d) for child in module.children())
