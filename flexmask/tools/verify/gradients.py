"""Losses and gradients of single turns and of a step: through a packed row, and through N-pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from flexmask.backends.flex import kept_graphs
from flexmask.model.adapter import sequence_group_of, wrong_masks
from flexmask.model.loss import target_logprobs
from flexmask.model.npass import npass_batches
from flexmask.model.sequence_group import SequenceGroup
from flexmask.packing.rows import PackedRow, stack_rows
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample

Gradients = dict[str, Tensor]


class PassResult(NamedTuple):
    """What a pass gives: losses, fp64 [n] on the CPU, and the gradients of their mean.

    The losses are those of a turn's trained tokens, or the one of a step.
    """

    losses: Tensor
    gradients: Gradients

    def averaged(self, ranks: SequenceGroup | None) -> PassResult:
        """The result with gradients averaged over the processes that share rows, if any."""
        if ranks is not None:
            for gradient in self.gradients.values():
                distributed.all_reduce(gradient, group=ranks.group)
                gradient /= ranks.size
        return self


def padded_batch(row: PackedRow, ranks: SequenceGroup | None) -> dict[str, Tensor]:
    """The row as a batch, padded so that it can be shared, if it is."""
    return stack_rows([row], pad_to_multiple_of=1 if ranks is None else 2 * ranks.size)


def npass_losses(model: PreTrainedModel, sample: Sample) -> Tensor:
    """The loss of each trained token of a sample, [n], through an unpatched model."""
    (batch,) = npass_batches([sample])
    labels = batch["shift_labels"]
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logprobs = target_logprobs(model(**inputs).logits, labels)
    return -logprobs[0, (labels[0] != IGNORE_INDEX).to(logprobs.device)]


def single_pass_losses(row: PackedRow, logprobs: Tensor, number: int, sample: Sample) -> Tensor:
    """The loss of each trained token of sample `number` of a row, [n]; `logprobs` of the row."""
    trained = np.flatnonzero(sample.loss_weights[1:]) + 1
    predicting = row.sample_indices[number][trained - 1]
    if not np.array_equal(row.shift_labels[predicting], sample.input_ids[trained]):
        raise AssertionError("a packed position predicts another token than its sample's")
    return -logprobs[torch.from_numpy(predicting).to(logprobs.device)]


def row_logprobs(
    model: PreTrainedModel, row: PackedRow, *, subtree_end: np.ndarray | None = None
) -> Tensor:
    """The log-probability of each packed position's target, [L]; 0 where there is none.

    Args:
        model: a patched model.
        row: the row.
        subtree_end: a mask in place of the row's own.
    """
    ranks = sequence_group_of(model)
    batch = padded_batch(row, ranks)
    if subtree_end is not None:
        batch["subtree_end"][0, : len(row)] = torch.from_numpy(subtree_end)
    names = ("input_ids", "position_ids", "subtree_end")
    with nullcontext() if subtree_end is None else wrong_masks(model):
        logits = model(**{name: batch[name].to(model.device) for name in names}).logits
    labels = batch["shift_labels"]
    if ranks is None:
        return target_logprobs(logits, labels)[0]
    return ranks.gather(target_logprobs(logits, ranks.cut(labels)))[0, : len(row)]


def turn_result(
    model: PreTrainedModel, losses: Tensor, *, retain_graph: bool = False
) -> PassResult:
    """The result of a turn with these losses; parameters that play no part have gradients of 0."""
    trainable = _trainable(model)
    with kept_graphs():
        found = torch.autograd.grad(
            losses.mean(),
            list(trainable.values()),
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    gradients = dict(zip(trainable, found, strict=True))
    return PassResult(losses.detach().double().cpu(), gradients)


def step_result(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], num_trained: int
) -> PassResult:
    """The result of an optimizer step, as the model itself computes its loss."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        loss = model(**moved, num_items_in_batch=num_trained).loss
        loss.backward()
        total += float(loss.detach())
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in _trainable(model).items()
    }
    model.zero_grad(set_to_none=True)
    return PassResult(torch.tensor([total], dtype=torch.float64), gradients)


def _trainable(model: PreTrainedModel) -> Gradients:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
