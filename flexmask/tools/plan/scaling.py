"""Memory at scale: every form of a row's mask, and how many devices a long row takes.

Masks are counted, in blocks of 128 tokens on a side. Activations are those of `memory`, per token
and in bf16; weights, gradients and AdamW's moments are in fp32, sharded over all ranks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import noop_mask
from transformers import PreTrainedConfig

from flexmask.errors import UnsupportedModelError
from flexmask.model.load import meta_model
from flexmask.tools.plan.memory import logits_bytes_per_token, saved_bytes_per_token, state_bytes
from flexmask.tree.block_mask import build_block_mask
from flexmask.tree.tiles import tile_ranges

BLOCK = 128  # FlexAttention's default
_TRITON_TILE = (128, 64)  # of the project's kernels for heads 128 wide, on sm_90 and newer
_INT32 = 4


def mask_bytes(end: np.ndarray) -> dict[str, int]:
    """Bytes of each form of the mask of a row with subtree ends `end` [L].

    Returns:
        "subtree_end": one int32 a token, all that travels with a batch; "block_mask": the index
        tensors of `TreeMask.to_block_mask`; "flex_tables": what the `flex` backend makes of them,
        four tables of N x N entries; "triton_lists": lists of tiles and lines of the forward pass,
        allocated for the densest mask there is; "triton_used": the entries of them that are
        written; "dense": one byte a pair.
    """
    length = end.size
    blocks = -(-length // BLOCK)
    tensors = build_block_mask(end[None], BLOCK, noop_mask, torch.device("cpu")).as_tuple()
    lines, capacity = (-(-length // size) for size in _TRITON_TILE)
    per_line = (4 + 1) * _INT32 * lines  # counts, and the order of lines
    return {
        "subtree_end": _INT32 * length,
        "block_mask": sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)),
        "flex_tables": 4 * _INT32 * blocks * (blocks + 1),
        "triton_lists": _INT32 * lines * capacity + per_line,
        "triton_used": _INT32 * tile_ranges(end, *_TRITON_TILE).num_visited + per_line,
        "dense": length**2,
    }


@dataclass(frozen=True, slots=True)
class RowMemory:
    """Bytes for each token of a row, by what a layer leaves behind and what the loss takes.

    Attributes:
        num_layers: decoder layers.
        checkpoint: the input of a layer, in bf16.
        layer: what autograd keeps of one layer.
        stock_loss: logits in bf16, their fp32 copy and its gradient, as losses of transformers do.
        chunked_loss: logits and their gradient in bf16, as `flexmask.model.loss` does.
        fused_loss: the last hidden states and their gradient, where logits are made and dropped a
            few tokens at a time (a fused head).
        state: of weights, gradients and AdamW's moments in fp32; of the model, not of a token.
    """

    num_layers: int
    checkpoint: float
    layer: float
    stock_loss: float
    chunked_loss: float
    fused_loss: float
    state: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> RowMemory:
        """The figures of the model that `config` describes, all layers alike.

        Raises:
            UnsupportedModelError: its activations cannot be told from shapes.
        """
        single = copy.deepcopy(config)
        single.num_hidden_layers = 1
        if getattr(single, "layer_types", None):
            single.layer_types = single.layer_types[:1]
        models = [meta_model(c, torch.bfloat16) for c in (single, config)]
        saved = [saved_bytes_per_token(model) for model in models]
        if saved[0] is None or saved[1] is None:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r}: what autograd keeps cannot be told from shapes"
            )
        num_layers = config.num_hidden_layers
        layer = (saved[1] - saved[0]) / (num_layers - 1)
        hidden = config.hidden_size * torch.bfloat16.itemsize
        return cls(
            num_layers=num_layers,
            checkpoint=hidden,
            layer=layer,
            stock_loss=saved[0] - layer + logits_bytes_per_token(models[1]),
            chunked_loss=2 * config.vocab_size * torch.bfloat16.itemsize,
            fused_loss=2 * hidden,
            state=state_bytes(models[1]) * torch.float32.itemsize // torch.bfloat16.itemsize,
        )

    def ways(self) -> dict[str, float]:
        """Bytes for each token of a row, by way to train, each adding to the one before.

        With checkpointing, one layer at a time is computed again after the loss is through.
        """
        checkpoints = self.num_layers * self.checkpoint
        return {
            "everything kept": self.num_layers * self.layer + self.stock_loss,
            "checkpointing": checkpoints + max(self.layer, self.stock_loss),
            "loss in chunks": checkpoints + max(self.layer, self.chunked_loss),
            "fused head": checkpoints + max(self.layer, self.fused_loss),
            "checkpoints on the host": max(self.layer, self.fused_loss),
        }


def longest_row(
    bytes_per_token: float, state: int, num_ranks: int, device_bytes: int, reserve: int
) -> int:
    """Tokens that one device holds beside its share of the state and a reserve, at least 0.

    Args:
        bytes_per_token: one of `RowMemory.ways`.
        state: bytes of `RowMemory.state`.
        num_ranks: that the state is sharded over.
        device_bytes: memory of a device.
        reserve: bytes for gathered weights, the runtime and fragmentation.
    """
    return max(0, math.floor((device_bytes - reserve - state / num_ranks) / bytes_per_token))


def devices_needed(num_tokens: int, longest: int) -> int | None:
    """Devices that a row has to be cut over; None where not even one token fits."""
    return -(-num_tokens // longest) if longest else None
