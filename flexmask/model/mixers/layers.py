"""Layers that write out how they look along the sequence, each rewritten to follow a tree.

Their forward calls no function by which it looks along the sequence, so there is no name to put a
tree in the place of. What follows is the layer itself, on its own weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexmask.model.mixers.plan import Plan
from flexmask.model.mixers.recurrence import tree_chunk_scan


def tree_lightning_attention(
    layer: Any, plan: Plan, hidden_states: Tensor
) -> tuple[Tensor, Tensor | None]:
    """MiniMax's lightning attention over a tree, with states handed to branches.

    It is attention without a softmax whose weights decay by a constant factor a token,

        S_t = exp(-slope) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,

    which is the scan of Mamba-2 with steps of 1, a group a head, A = -slope, B = k and C = q.

    Args:
        layer: a MiniMaxLightningAttention.
        plan: of the tree batch.
        hidden_states: [B, L, C].

    Returns:
        The output [B, L, C], and None for the final state.
    """
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    heads = (layer.num_attention_heads, 3 * layer.head_dim)
    q, k, v = layer.act_fn(layer.qkv_proj(hidden_states)).unflatten(-1, heads).chunk(3, dim=-1)
    steps = torch.ones_like(v[..., 0])
    slopes = layer.slope_rate.flatten()
    output = tree_chunk_scan(plan, mamba2_chunk_scan, v, steps, -slopes, k, q, layer.block_size)
    output = layer.norm(output.flatten(-2).to(hidden_states.dtype))
    return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * output), None


def tree_compressed_projection(
    layer: Any, plan: Plan, hidden_states: Tensor
) -> tuple[Tensor | None, ...]:
    """ZAYA's projection to queries, keys and values over a tree, in one call over all chains.

    It convolves queries and keys, and takes half of each value from the token before. A path begins
    with tokens of zeros, which are its padding as long as there is no bias.

    Args:
        layer: a ZayaCCAProjection.
        plan: of the tree batch.
        hidden_states: [B, L, C].

    Returns:
        Queries, keys and values [B, L, H, D] each.
    """
    tokens, absent, places = plan.chains(layer.conv_kernel_size)
    chains = hidden_states.flatten(0, 1).index_select(0, tokens).index_fill(0, absent, 0)
    outputs = type(layer).forward(layer, chains[None], None)
    shape = hidden_states.shape[:2]
    return tuple(part[0].index_select(0, places).unflatten(0, shape) for part in outputs)
