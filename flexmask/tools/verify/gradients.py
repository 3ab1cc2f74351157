"""Losses and gradients of single turns and of a step: through a packed row, and through N-pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexmask.backends.kept_graphs import kept_graphs
from flexmask.model.adapter import wrong_masks
from flexmask.model.loss import target_logprobs
from flexmask.model.npass import npass_batches
from flexmask.packing.rows import PackedRow
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample

Gradients = dict[str, Tensor]


class TurnResult(NamedTuple):
    """Losses of a turn's trained tokens, fp64 [n] on the CPU, and the gradients of their mean."""

    losses: Tensor
    gradients: Gradients


def npass_turn(model: PreTrainedModel, sample: Sample) -> TurnResult:
    """One sample alone through an unpatched model."""
    return _turn_result(model, npass_losses(model, sample), retain_graph=False)


def npass_losses(model: PreTrainedModel, sample: Sample) -> Tensor:
    """The loss of each trained token of a sample, [n], through an unpatched model."""
    (batch,) = npass_batches([sample])
    labels = batch["shift_labels"]
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logprobs = target_logprobs(model(**inputs).logits, labels)
    return -logprobs[0, (labels[0] != IGNORE_INDEX).to(logprobs.device)]


def single_pass_turn(
    model: PreTrainedModel, row: PackedRow, logprobs: Tensor, number: int, sample: Sample
) -> TurnResult:
    """One sample of a packed row; its graph is kept for the others.

    Args:
        model: whose parameters the gradients are of.
        row: the row.
        logprobs: of the row, from `row_logprobs`.
        number: of the sample in the row.
        sample: the sample itself.
    """
    trained = np.flatnonzero(sample.loss_weights[1:]) + 1
    predicting = row.sample_indices[number][trained - 1]
    if not np.array_equal(row.shift_labels[predicting], sample.input_ids[trained]):
        raise AssertionError("a packed position predicts another token than its sample's")
    losses = -logprobs[torch.from_numpy(predicting).to(logprobs.device)]
    return _turn_result(model, losses, retain_graph=True)


def row_logprobs(
    model: PreTrainedModel, row: PackedRow, *, subtree_end: np.ndarray | None = None
) -> Tensor:
    """The log-probability of each packed position's target, [L]; 0 where there is none.

    Args:
        model: a patched model.
        row: the row.
        subtree_end: a mask in place of the row's own.
    """
    batch = row.to_batch()
    if subtree_end is not None:
        batch["subtree_end"] = torch.from_numpy(subtree_end)[None]
    names = ("input_ids", "position_ids", "subtree_end")
    with nullcontext() if subtree_end is None else wrong_masks(model):
        logits = model(**{name: batch[name].to(model.device) for name in names}).logits
    return target_logprobs(logits, batch["shift_labels"])[0]


def step_result(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], num_trained: int
) -> tuple[float, Gradients]:
    """Loss and gradients of an optimizer step, as the model itself computes its loss."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        loss = model(**moved, num_items_in_batch=num_trained).loss
        loss.backward()
        total += float(loss.detach())
    gradients = {name: _or_zeros(p.grad, p) for name, p in _trainable(model).items()}
    model.zero_grad(set_to_none=True)
    return total, gradients


def _turn_result(model: PreTrainedModel, losses: Tensor, *, retain_graph: bool) -> TurnResult:
    named = _trainable(model)
    with kept_graphs():
        found = torch.autograd.grad(
            losses.mean(), list(named.values()), retain_graph=retain_graph, allow_unused=True
        )
    gradients = {
        name: _or_zeros(gradient, p)
        for (name, p), gradient in zip(named.items(), found, strict=True)
    }
    return TurnResult(losses.detach().double().cpu(), gradients)


def _trainable(model: PreTrainedModel) -> Gradients:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """The gradient, zeros for a parameter that plays no part."""
    return torch.zeros_like(parameter) if gradient is None else gradient
