"""The attention function that patched models run.

A tree batch travels as its attention mask: an int32 tensor [B, 1, 2, L] of subtree ends and
positions. It passes through every family's mask code unchanged, and survives checkpointing. Any
other mask belongs to an ordinary batch: it goes to the implementation that the model's own
configuration names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexmask.backends.api import dispatch
from flexmask.errors import UnsupportedModelError
from flexmask.model.sequence_group import SequenceGroup
from flexmask.model.temperature import Temperature
from flexmask.model.windows import Window

NAME = "flexmask"
STATE = "_flexmask"  # attribute of the patched modules that holds what a patch knows of them

# Arguments of the attention interface that change what is computed, in ways that we do not know.
_NOT_COVERED = (
    *("position_bias", "attention_bias", "head_mask", "cache", "indices"),
    *("chunk_size", "block_sequence_ids"),
)
_NOT_PASSED = object()

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(eq=False)
class LayerPatch:
    """What is known of one patched attention module.

    Attributes:
        config: the model's own configuration, which names the implementation of ordinary batches.
        eager: the attention that the name "eager" stands for in the module's family.
        backend: the attention backend for trees.
        window: how far back its queries see.
        temperature: the factor by position that is in its queries, or None; see `temperature`.
        kernel_options: of backend `flex`, or None.
        sequence_group: of the ranks over which its tokens are cut, or None.
        was_called: whether a tree mask has come by since the forward pass began.
    """

    config: PreTrainedConfig
    eager: AttentionFunction
    backend: str
    window: Window
    temperature: Temperature | None = None
    kernel_options: Mapping[str, Any] | None = None
    sequence_group: SequenceGroup | None = None
    was_called: bool = False


def to_mask(subtree_end: Tensor, position_ids: Tensor) -> Tensor:
    """The int32 tensor [B, 1, 2, L] that stands for a tree batch; both arguments are [B, L]."""
    return torch.stack((subtree_end.int(), position_ids.int()), dim=1)[:, None]


def is_tree(attention_mask: Any) -> TypeGuard[Tensor]:
    """Whether an attention mask is one of ours: no other is of integers and 4-dimensional."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.ndim == 4
        and attention_mask.dtype == torch.int32
    )


def flexmask_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An implementation of the attention interface of transformers, for patched models.

    Args:
        module: a patched attention module.
        query: [B, H, L, D].
        key: [B, H_kv, L, D].
        value: [B, H_kv, L, D_v].
        attention_mask: of a tree batch, see `to_mask`, or of any other.
        **kwargs: scaling, dropout and what else the family passes.

    Returns:
        The output [B, L, H, D_v], and None for the attention weights of a tree.
    """
    layer: LayerPatch | None = getattr(module, STATE, None)
    if layer is None:
        _refuse_unpatched()
    if not is_tree(attention_mask):
        name = layer.config._attn_implementation
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(name, layer.eager)
        return stock(module, query, key, value, attention_mask, **kwargs)
    layer.was_called = True
    return _attend(layer, query, key, value, attention_mask, **kwargs), None


def _attend(
    layer: LayerPatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: Any = _NOT_PASSED,
    is_causal: bool | None = None,
    **options: Any,
) -> Tensor:
    """Attention over a tree: query [B, H, L, D] and so on in, [B, L, H, D_v] out.

    With a sequence group, the mask is that of whole rows, and all else of this rank's tokens.
    """
    ranks = layer.sequence_group
    if dropout:
        raise UnsupportedModelError(
            f"attention dropout must be 0, got {dropout}; N-pass would drop other weights"
        )
    for name in _NOT_COVERED:
        if options.get(name) is not None:
            raise UnsupportedModelError(f"attention with {name} is not exact on a tree")
    if is_causal is False:
        raise UnsupportedModelError("attention to later tokens is not exact on a tree")
    if sliding_window is not _NOT_PASSED and sliding_window != layer.window.window:
        raise UnsupportedModelError(
            f"a layer calls its attention with sliding_window={sliding_window}, but the window of "
            f"its configuration is {layer.window.window}; it cannot be told which one N-pass has"
        )
    num_keys = key.shape[2] * (ranks.size if ranks else 1)
    if num_keys != mask.shape[-1]:
        raise UnsupportedModelError(
            f"a tree of {mask.shape[-1]} tokens met {num_keys} keys; put nothing before it"
        )
    dtype = value.dtype  # under autocast, families differ in what they leave in fp32
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    mask = mask.to(query.device)
    if layer.temperature is not None:
        positions = mask[:, 0, 1]
        query = layer.temperature.correct(query, ranks.cut(positions) if ranks else positions)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return dispatch(
            q,
            k,
            v,
            mask[:, 0, 0],
            scale=scaling,
            softcap=softcap,
            sinks=sinks,
            backend=layer.backend,
            kernel_options=layer.kernel_options,
            **layer.window._asdict(),
        )

    query, key, value = (x.to(dtype) for x in (query, key, value))
    if ranks:
        output = ranks.over_heads(attend, query, key, value, s_aux)
    else:
        output = attend(query, key, value, s_aux)
    return output.transpose(1, 2).contiguous()  # some families view it


def _refuse_unpatched(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        f"attn_implementation={NAME!r} was set on a model that is not patched; load the model with "
        "another one, and call flexmask.patch(model)"
    )


AttentionInterface.register(NAME, flexmask_attention)
# Patched models build the masks of ordinary batches for their own implementation.
AttentionMaskInterface.register(NAME, _refuse_unpatched)
