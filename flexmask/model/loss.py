"""Losses over packed rows: weighted cross entropy, and log-probabilities for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flexmask.errors import DataError, UnsupportedModelError
from flexmask.model.logprobs import score_tokens
from flexmask.model.sequence_group import SequenceGroup
from flexmask.tree.layout import IGNORE_INDEX

if TYPE_CHECKING:
    from flexmask.packing.rows import PackedRow

_UNSHIFTED = (
    "a tree batch needs shift_labels beside labels: the next token of a sample is not always the "
    "next one in the row; use TreeCollator, or PackedRow.to_batch"
)


def target_logprobs(logits: Tensor, shift_labels: Tensor) -> Tensor:
    """The log-probability of each position's target, [B, L]; 0 where there is none.

    For supervised losses: a position has one target. Where samples go on differently after it, or
    a token is of interest that carries no weight, take `token_logprobs`. Computed in fp32, or fp64
    if `logits` is, a few tokens at a time.

    Args:
        logits: [B, L, V].
        shift_labels: int64 [B, L], -100 where nothing is trained.

    Raises:
        DataError: logits of other positions than the labels.
    """
    if logits.shape[:-1] != shift_labels.shape:
        raise DataError(
            f"shift_labels must be [B, L] = {list(logits.shape[:-1])} like the logits, "
            f"got {list(shift_labels.shape)}"
        )
    flat = logits.flatten(0, -2)
    positions = torch.arange(flat.shape[0], device=flat.device)
    logprobs, _ = score_tokens(flat, positions, shift_labels.flatten().to(flat.device))
    return logprobs.view(shift_labels.shape)


def token_logprobs(logits: Tensor, row: PackedRow) -> Tensor:
    """The log-probability of each token of `row` given the tokens before it in its samples, [L].

    It belongs to the token itself, not to the position that predicts it, so that forks, weights and
    splitting are of no account: `row.gather` hands each sample the log-probabilities of its own
    tokens, in line with its `input_ids` and `loss_weights`. The first token of a sample, which
    nothing predicts, has 0. Precision as in `target_logprobs`.

    Args:
        logits: [L, V], in packed order.
        row: the row that they were computed for.

    Raises:
        DataError: `logits` of another length than the row, or a token id that is none of the V.
    """
    return _score_row(logits, row, with_entropies=False)[0]


def token_logprobs_and_entropies(logits: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of the distribution that predicts each token; both [L].

    Entropies are in nats, and 0 where nothing predicts the token. Both are differentiable.

    Args:
        logits: [L, V], in packed order.
        row: the row that they were computed for.

    Raises:
        DataError: `logits` of another length than the row, or a token id that is none of the V.
    """
    return _score_row(logits, row, with_entropies=True)


def _score_row(logits: Tensor, row: PackedRow, *, with_entropies: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the tokens of `row`; both [L]."""
    if logits.ndim != 2 or logits.shape[0] != len(row):
        raise DataError(
            f"logits must be [L, V] with L = {len(row)}, the tokens of the row, "
            f"got {list(logits.shape)}; take one row of a batch, without its padding"
        )
    size = logits.shape[1]
    highest = row.input_ids.max(initial=-1)
    if highest >= size:
        raise DataError(f"token ids must be below V = {size}, got {highest}")
    before = row.predicted_from
    keys = np.where(before < 0, -1, before * size + row.input_ids)  # position and token in one
    # a token that is held twice after the same position is one prediction
    distinct, prediction = np.unique(np.append(keys, -1), return_inverse=True)
    found = np.stack(np.divmod(distinct[1:], size))  # without -1, the first tokens of trees
    positions, tokens = torch.from_numpy(found).to(logits.device)
    logprobs, entropies = score_tokens(logits, positions, tokens, with_entropies=with_entropies)

    def by_token(scores: Tensor) -> Tensor:
        index = torch.from_numpy(prediction[:-1]).to(logits.device)
        return torch.cat((scores.new_zeros(1), scores))[index]

    return by_token(logprobs), by_token(entropies[positions]) if with_entropies else entropies


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
        loss_weights: [B, L]; 1 for each trained position if None, of no account elsewhere.
        num_items_in_batch: the divisor, such as the sum of the weights of a whole optimizer step;
            the sum of the weights given here if None.

    Raises:
        DataError: logits or weights of another shape than the labels.
    """
    if loss_weights is not None and loss_weights.shape != shift_labels.shape:
        raise DataError(
            f"loss_weights must have the shape of shift_labels, {list(shift_labels.shape)}, "
            f"got {list(loss_weights.shape)}"
        )
    logprobs = target_logprobs(logits, shift_labels)
    is_trained = (shift_labels != IGNORE_INDEX).to(logprobs)
    weights = is_trained if loss_weights is None else is_trained * loss_weights.to(logprobs)
    if num_items_in_batch is None:
        num_items_in_batch = weights.sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logprobs.device)
    return -(weights * logprobs).sum() / num_items_in_batch


class TreeLoss:
    """A model's own loss function that also understands what comes with a tree batch.

    Without `loss_weights` the model's loss is called, untouched.

    Attributes:
        original: the model's loss function.
        is_own: whether `original` was set on the model itself, not chosen by its class.
        sequence_group: of the ranks over which tokens are cut, or None; losses are sums over them.
        was_called: whether a loss has been computed since `expect`.
    """

    def __init__(
        self,
        original: Callable[..., Tensor],
        *,
        is_own: bool = False,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        self.original = original
        self.is_own = is_own
        self.sequence_group = sequence_group
        self.was_called = False
        self._expected: tuple[str, ...] = ()
        self._is_cut = False

    def expect(self, is_tree_batch: bool, arguments: dict[str, Any]) -> None:
        """Note which `arguments` of the model must reach its next loss; some models drop them.

        With a sequence group, labels and weights of a tree batch are replaced by this rank's.
        """
        self.was_called = False
        given = [n for n in ("shift_labels", "loss_weights") if arguments.get(n) is not None]
        if is_tree_batch and arguments.get("labels") is not None and "shift_labels" not in given:
            raise DataError(_UNSHIFTED)
        self._is_cut = is_tree_batch and bool(given) and self.sequence_group is not None
        if self.sequence_group is not None and self._is_cut:
            _cut_targets(self.sequence_group, arguments)
            given.append("num_items_in_batch")
        self._expected = tuple(given)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *args: Any,
        subtree_end: Tensor | None = None,
        loss_weights: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss; `labels` are not looked at where there are `shift_labels`.

        `num_items_in_batch` is named since trainers look for it before they give it.

        Raises:
            DataError: a tree batch whose labels are not shifted along the tree, or weights that
                belong to no labels.
            UnsupportedModelError: the model has dropped an argument on the way here.
        """
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        shift_labels = kwargs.get("shift_labels")
        arrived = {**kwargs, "loss_weights": loss_weights}
        for name in self._expected:
            if arrived.get(name) is None:
                raise UnsupportedModelError(f"the model does not hand {name} to its loss function")
        self.was_called, self._expected = True, ()
        if subtree_end is not None and shift_labels is None:
            raise DataError(_UNSHIFTED)
        if loss_weights is None:
            loss = self.original(logits, labels, *args, **kwargs)
        elif shift_labels is None:
            raise DataError("loss_weights belong to shift_labels, which are missing")
        else:
            divisor = kwargs.get("num_items_in_batch")
            loss = weighted_causal_loss(logits, shift_labels, _as_given(loss_weights), divisor)
        if self._is_cut and self.sequence_group is not None:
            return self.sequence_group.sum(loss)
        return loss


def _cut_targets(ranks: SequenceGroup, arguments: dict[str, Any]) -> None:
    """Leave this rank's labels and weights, divided by what is trained of the whole batch."""
    if arguments.get("num_items_in_batch") is None:
        is_trained = arguments["shift_labels"] != IGNORE_INDEX
        weights = arguments.get("loss_weights")
        total = is_trained if weights is None else is_trained * _as_given(weights)
        arguments["num_items_in_batch"] = total.sum()
    for name in ("labels", "shift_labels", "loss_weights"):
        if arguments.get(name) is not None:
            arguments[name] = ranks.cut(arguments[name])


def as_bits(loss_weights: Tensor) -> Tensor:
    """fp32 weights [B, L] as int16 [B, L, 2] with the same bits, which no mixed precision rounds.

    A shape that no weights have, so that integers are never taken for bits.
    """
    return loss_weights.unsqueeze(-1).view(torch.int16)


def _as_given(loss_weights: Tensor) -> Tensor:
    """Loss weights that may have come through the mixed precision of a trainer.

    int16 [B, L, 2] are the bits of fp32, see `as_bits`. Halves have been rounded on the way, such
    as 1/3 by a part in 1,500: FSDP and DeepSpeed do that to every floating-point argument.
    """
    if loss_weights.dtype == torch.int16 and loss_weights.ndim == 3:
        return loss_weights.view(torch.float32)[..., 0]
    if loss_weights.dtype in (torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"loss_weights must be float32 or float64, got {loss_weights.dtype}, which has rounded "
            "them; use TreeTrainer, which keeps them exact under FSDP and DeepSpeed"
        )
    return loss_weights
