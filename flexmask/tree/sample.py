"""One training sequence, as the model would meet it at inference."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmask.errors import DataError

# Weights of training in fp32: products with losses, and sums over a step, stay within its range.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training sequence: context and completion, with a loss weight for every token.

    Attributes:
        input_ids: token ids, int64 [n], at least one; lists and arrays are accepted.
        loss_weights: float64 [n], each 0 or between 1e-30 and 1e30; token i is a target where its
            weight is above 0. Nothing predicts the first token, so its weight counts for nothing.
        key: anything hashable that tells the caller which sample this is, such as a turn number.

    Raises:
        DataError: the arrays are empty, differ in length, or hold a value outside their range.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray
    key: Hashable = None

    def __init__(
        self,
        input_ids: Sequence[int] | np.ndarray,
        loss_weights: Sequence[float] | np.ndarray,
        key: Hashable = None,
    ) -> None:
        ids = _as_vector(input_ids, "input_ids", key)
        weights = _as_vector(loss_weights, "loss_weights", key).astype(np.float64)
        if ids.size == 0:
            raise DataError(f"{_name(key)}: input_ids is empty; a sample needs at least one token")
        if not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"{_name(key)}: input_ids must be integers, got {ids.dtype}")
        if ids.size != weights.size:
            raise DataError(
                f"{_name(key)}: loss_weights must have one value per token, "
                f"got {weights.size} for {ids.size} tokens"
            )
        if ids.min() < 0 or ids.max() > np.iinfo(np.int64).max:
            bad_id = ids[(ids < 0) | (ids > np.iinfo(np.int64).max)][0]
            raise DataError(f"{_name(key)}: token ids must be int64 of at least 0, got {bad_id}")
        if not (np.isfinite(weights).all() and weights.min() >= 0):
            bad = weights[~(np.isfinite(weights) & (weights >= 0))][0]
            raise DataError(f"{_name(key)}: loss weights must be finite and at least 0, got {bad}")
        lost = (weights > LARGEST_WEIGHT) | ((weights > 0) & (weights < SMALLEST_WEIGHT))
        if lost.any():
            index = int(lost.argmax())
            raise DataError(
                f"{_name(key)}: the loss weight of token {index} must be 0 or between "
                f"{SMALLEST_WEIGHT:g} and {LARGEST_WEIGHT:g}, got {weights[index]:g}: losses are "
                "summed in fp32; scale all weights"
            )
        object.__setattr__(self, "input_ids", ids.astype(np.int64))
        object.__setattr__(self, "loss_weights", weights)
        object.__setattr__(self, "key", key)

    def __len__(self) -> int:
        return self.input_ids.size

    @property
    def num_trained(self) -> int:
        """Number of tokens that carry loss: those with a weight above 0, the first excepted."""
        return int(np.count_nonzero(self.loss_weights[1:]))


def _as_vector(values: Any, name: str, key: Hashable) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{_name(key)}: {name} must be one-dimensional, got shape {array.shape}")
    return array


def _name(key: Hashable) -> str:
    return "sample" if key is None else f"sample {key!r}"


def common_prefix_length(a: Any, b: Any) -> int:
    """How many items two texts, two lists or two arrays have in common from the start."""
    low, high = 0, min(len(a), len(b))
    if isinstance(a, np.ndarray):
        differs = a[:high] != b[:high]
        return int(differs.argmax()) if differs.any() else high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
