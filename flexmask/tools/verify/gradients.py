"""Losses and gradients of single turns and of a step: through a packed row, and through N-pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

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
    batch = _npass_batch(model, sample)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    return _token_losses(model(**inputs).logits, batch)


def npass_result(model: PreTrainedModel, sample: Sample) -> PassResult:
    """The result of a turn through an unpatched model; the gradients are of its own loss."""
    batch = _npass_batch(model, sample)
    out = model(**batch, num_items_in_batch=sample.num_trained)
    return turn_result(model, _token_losses(out.logits.detach(), batch), out.loss)


def _npass_batch(model: PreTrainedModel, sample: Sample) -> dict[str, Tensor]:
    (batch,) = npass_batches([sample])
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _token_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["shift_labels"]
    return -target_logprobs(logits, labels)[0, labels[0] != IGNORE_INDEX]


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


def turn_result(model: PreTrainedModel, losses: Tensor, mean: Tensor | None = None) -> PassResult:
    """The result of a turn with these losses; parameters that play no part have gradients of 0.

    Args:
        model: that gave them.
        losses: of the trained tokens, [n].
        mean: of them, as the model itself computes it; by default that of `losses`.
    """
    trainable = _trainable(model)
    mean = losses.mean() if mean is None else mean
    found = torch.autograd.grad(
        mean, list(trainable.values()), allow_unused=True, materialize_grads=True
    )
    gradients = dict(zip(trainable, found, strict=True))
    return PassResult(losses.detach().double().cpu(), gradients)


def step_result(model: PreTrainedModel, batch: dict[str, Tensor], num_trained: int) -> PassResult:
    """The result of an optimizer step on one batch, as the model itself computes its loss."""
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    loss = model(**moved, num_items_in_batch=num_trained).loss
    return turn_result(model, loss[None], loss)


class StepSum:
    """The result of a step in N-pass, added up turn by turn; gradients in main memory."""

    def __init__(self, num_trained: int) -> None:
        self.num_trained = num_trained
        self._losses: list[Tensor] = []
        self._gradients: Gradients = {}

    def add(self, turn: PassResult) -> None:
        """Add a turn, by its part of the trained tokens."""
        part = len(turn.losses) / self.num_trained
        self._losses.append(turn.losses)
        for name, gradient in turn.gradients.items():
            if name in self._gradients:
                self._gradients[name].add_(gradient.cpu(), alpha=part)
            else:
                self._gradients[name] = gradient.cpu() * part

    @property
    def result(self) -> PassResult:
        """The mean loss of all trained tokens, and its gradients."""
        return PassResult(torch.cat(self._losses).mean()[None], self._gradients)


def _trainable(model: PreTrainedModel) -> Gradients:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
