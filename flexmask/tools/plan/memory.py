"""Memory of a training step, from a model without weights.

What autograd keeps for the backward pass is asked of the model itself: it runs on the meta device,
where tensors have shapes and no data, with an attention that keeps what flash kernels keep (q, k,
v, output and logsumexp). It is linear in tokens, so two short sequences give the slope.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)

from flexmask.model.sequence_group import Heads
from flexmask.model.structure import text_config

_NAME = "flexmask_shapes"  # of an attention without arithmetic; never set on a model with weights
_LENGTHS = (64, 192)


def saved_bytes_per_token(model: PreTrainedModel, sequence_parallel_size: int = 1) -> float | None:
    """Bytes that autograd keeps for each token of a row; None where shapes alone do not tell.

    A mixture of experts looks at its data to route tokens, and so cannot be asked.

    Args:
        model: one on the meta device; its attention is exchanged.
        sequence_parallel_size: of so many processes, each of which keeps that of its own tokens;
            heads that do not divide by it are repeated and padded.
    """
    attention = partial(_shapes_attention, size=sequence_parallel_size)
    AttentionInterface.register(_NAME, attention)
    text_config(model)._attn_implementation = _NAME
    model.train()

    def run(length: int) -> Tensor:
        ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
        unused = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device="meta")  # 4-D: left alone
        logits = model(input_ids=ids, attention_mask=unused, use_cache=False).logits
        # as the losses of transformers have it, in fp32; `logprobs` keeps less
        return cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="sum")

    try:
        kept = [saved_bytes(model, partial(run, length)) for length in _LENGTHS]
    except RuntimeError:
        return None
    return (kept[1] - kept[0]) / (_LENGTHS[1] - _LENGTHS[0])


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward` leaves with autograd, each storage once, without the parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor.detach()  # a node that held its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del output  # held until all was counted
    return total


class _FlashShapes(torch.autograd.Function):
    """Saves what a flash kernel saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        logsumexp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _shapes_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    size: int,
    **_: Any,
) -> tuple[Tensor, None]:
    heads = Heads.of(query.shape[1], key.shape[1], size)
    spread = heads.pad_queries(query), heads.pad_keys(key), heads.pad_keys(value)
    return heads.drop_padding(_FlashShapes.apply(*spread)).transpose(1, 2), None


AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
