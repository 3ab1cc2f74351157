"""The attention function and the mask function that patched models run.

A tree batch travels as its attention mask: an int32 tensor [B, 1, 2, L] of subtree ends and
positions. It passes through every family's mask code unchanged, and survives checkpointing. Any other
mask belongs to an ordinary batch, and goes to the implementation that the model had before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexmask.backends.api import dispatch
from flexmask.errors import UnsupportedModelError

NAME = "flexmask"
STATE = "_flexmask"  # attribute of every attention module of a patched model


class PatchState:
    """What the attention modules of one patched model share.

    Attributes:
        backend: the attention backend.
        previous: the implementation that ordinary batches go to.
        num_layers: attention modules of the model.
        num_calls: calls with a tree mask since the forward pass began.
    """

    def __init__(self, backend: str, previous: str, num_layers: int) -> None:
        self.backend = backend
        self.previous = previous
        self.num_layers = num_layers
        self.num_calls = 0


def to_mask(subtree_end: Tensor, position_ids: Tensor) -> Tensor:
    """The int32 tensor [B, 1, 2, L] that stands for a tree batch; both arguments are [B, L]."""
    return torch.stack((subtree_end.int(), position_ids.int()), dim=1)[:, None]


def is_tree(attention_mask: Any) -> bool:
    """Whether an attention mask is one of ours: no other is of integers and 4-dimensional."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.ndim == 4
        and attention_mask.dtype == torch.int32
    )


def register(previous: str) -> str:
    """Register our implementation on top of `previous`, and return its name.

    The name tells what ordinary batches fall back to, so that nothing has to be looked up later.
    None of the names holds "flash", "sdpa" or "flex_attention", which set off checks.
    """
    name = {"sdpa": NAME}.get(previous, f"{NAME}_{_spelled(previous)}")
    AttentionInterface.register(name, _attention_over(previous))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    return name


def _spelled(previous: str) -> str:
    return previous.replace("flash_attention_", "fa").replace("flex_attention", "flex")


def _attention_over(previous: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function for tree batches, that leaves all others to `previous`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if is_tree(attention_mask):
            return _tree_attention(module, query, key, value, attention_mask, **kwargs), None
        stock = _eager_of(module) if previous == "eager" else ALL_ATTENTION_FUNCTIONS[previous]
        return stock(module, query, key, value, attention_mask, **kwargs)

    return attention


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of the file that `module` is defined in."""
    import sys

    return sys.modules[type(module).__module__].eager_attention_forward


def _tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention over a tree; query [B, H, L, D] and so on in, [B, L, H, D_v] out."""
    state: PatchState = getattr(module, STATE)
    if dropout:
        raise UnsupportedModelError(
            f"attention dropout must be 0, got {dropout}; N-pass would differ"
        )
    if not torch.compiler.is_compiling():
        state.num_calls += 1
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    output = dispatch(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        mask[:, 0, 0],
        mask[:, 0, 1],
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        window=sliding_window,
        backend=state.backend,
    )
    return output.transpose(1, 2).contiguous()
