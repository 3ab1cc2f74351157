"""Losses over packed rows: weighted cross entropy, and log-probabilities for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexmask.errors import DataError
from flexmask.layout import IGNORE_INDEX


def target_logprobs(logits: Tensor, shift_labels: Tensor) -> Tensor:
    """The log-probability of each position's target, [B, L]; 0 where there is none.

    `PackedRow.gather` hands them back sample by sample. Computed in fp32, or fp64 if `logits` is.

    Args:
        logits: [B, L, V].
        shift_labels: int64 [B, L], -100 where nothing is trained.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        shift_labels.flatten().to(logits.device),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return -losses.view(shift_labels.shape)


def weighted_causal_loss(
    logits: Tensor,
    shift_labels: Tensor,
    loss_weights: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """The weighted sum of negative log-probabilities divided by the number of items; a scalar.

    Args:
        logits: [B, L, V].
        shift_labels: int64 [B, L], -100 where nothing is trained.
        loss_weights: [B, L]; 1 for each trained position if None.
        num_items_in_batch: the divisor, such as the sum of the weights of a whole optimizer step;
            the sum of the weights given here if None.
    """
    logprobs = target_logprobs(logits, shift_labels)
    if loss_weights is None:
        loss_weights = (shift_labels != IGNORE_INDEX).to(logprobs)
    weights = loss_weights.to(logprobs)
    if num_items_in_batch is None:
        num_items_in_batch = weights.sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logprobs.device)
    return -(weights * logprobs).sum() / num_items_in_batch


class TreeLoss:
    """A model's own loss function that also understands what comes with a tree batch.

    Without `loss_weights` the model's loss is called, untouched.
    """

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *args: Any,
        subtree_end: Tensor | None = None,
        loss_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss; DataError for a tree batch whose labels are not shifted along the tree."""
        shift_labels = kwargs.get("shift_labels")
        if subtree_end is not None and shift_labels is None:
            raise DataError(
                "a tree batch needs shift_labels beside labels: the next token of a sample is not "
                "always the next one in the row; use TreeCollator, or PackedRow.to_batch"
            )
        if loss_weights is None:
            return self.original(logits, labels, *args, **kwargs)
        if shift_labels is None:
            raise DataError("loss_weights belong to shift_labels, which are missing")
        return weighted_causal_loss(
            logits, shift_labels, loss_weights, kwargs.get("num_items_in_batch")
        )
