"""Which families have recurrent or convolutional layers, and how these run on a tree."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import nn


class Mixer(NamedTuple):
    """A kind of recurrent or convolutional layer.

    Attributes:
        functions: what it calls to look along the sequence, see `OVER_A_TREE`.
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

# model_type -> the kind of its layers that are not attention.
MIXERS = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _GATED_DELTA),
    "olmo_hybrid": _GATED_DELTA,
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), _KIMI_DELTA),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLUTION),
    **dict.fromkeys(("falcon_h1", "nemotron_h", "bamba", "granitemoehybrid"), _MAMBA2),
    "jamba": _MAMBA,
}


def find_mixers(decoder: nn.Module) -> list[nn.Module]:
    """The recurrent and convolutional layers of a stack: those that hold a convolution."""
    return [
        module
        for module in decoder.modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
        and "hidden_states" in inspect.signature(module.forward).parameters
    ]
