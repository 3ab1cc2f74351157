"""The auxiliary loss of a mixture of experts, which sums over tokens and multiplies the sums.

It is not a sum over tokens itself, so it has to know how many samples hold each token. Models hand
it the attention mask, by which it multiplies what it sums up. In place of that, `sample_counts`
makes it the loss of a padded batch of all samples: a token of three samples is there three times,
and padding is not there at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flexmask.errors import DataError


def has_auxiliary_loss(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward pass with these arguments computes one.

    Args:
        config: of the decoder stack.
        kwargs: of the forward pass.
    """
    asked = kwargs.get("output_router_logits")
    return bool(getattr(config, "output_router_logits", False) if asked is None else asked)


def take_counts(kwargs: dict[str, Any], counts: Tensor | None) -> bool:
    """Put the counts [B, L] of a tree batch in the place of its attention mask.

    Padding alone, the batch of a process for which there is no tree, has no auxiliary loss; where
    the caller has asked for one it gets that of the padding, which is a number.

    Args:
        kwargs: of the forward pass, which are changed.
        counts: how many samples hold each token.

    Returns:
        Whether there is an attention mask now.

    Raises:
        DataError: there are no counts, or they have another shape than `subtree_end`.
    """
    if counts is None:
        raise DataError(
            "the auxiliary loss of experts needs sample_counts, how many samples hold each token; "
            "take them from TreeCollator or PackedRow.to_batch, or set output_router_logits=False"
        )
    shape = kwargs["subtree_end"].shape
    if counts.shape != shape:
        raise DataError(
            f"sample_counts must be {list(shape)} like subtree_end, got {list(counts.shape)}"
        )
    is_padding = ~counts.any()
    if kwargs.get("output_router_logits") or torch.compiler.is_compiling():
        counts = torch.where(is_padding, 1, counts)
    elif is_padding:
        kwargs["output_router_logits"] = False
        return False
    kwargs["attention_mask"] = counts
    return True


@contextmanager
def without_auxiliary_loss(config: PreTrainedConfig) -> Iterator[bool]:
    """A block in which none is computed, and whether one would be."""
    asked = has_auxiliary_loss(config, {})
    if asked:
        config.output_router_logits = False
    try:
        yield asked
    finally:
        if asked:
            config.output_router_logits = True
