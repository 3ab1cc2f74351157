"""Samples as rows for other trainers: one sequence a row, which trained alone is N-pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flexmask.errors import DataError, need_packages
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample


def sample_row(sample: Sample, *, weighted: bool = False) -> dict[str, Any]:
    """A sample as plain data.

    `input_ids` and `labels` are lists of equal length: a label is the token of its own place, -100
    where that is context (models shift labels by themselves). `key` is the sample's.

    Args:
        sample: the sample.
        weighted: write `loss_weights`, too.
    """
    weights = sample.loss_weights.copy()
    weights[0] = 0  # nothing predicts the first token
    row = {
        "input_ids": sample.input_ids.tolist(),
        "labels": np.where(weights > 0, sample.input_ids, IGNORE_INDEX).tolist(),
    }
    if weighted:
        row["loss_weights"] = weights.tolist()
    return row | {"key": sample.key}


def is_weighted(sample: Sample) -> bool:
    """Whether labels alone do not say all of a sample: a weight is neither 0 nor 1."""
    return bool(np.any(~np.isin(sample.loss_weights[1:], (0, 1))))


def to_dataset(samples: Iterable[Sample]) -> Any:
    """A `datasets.Dataset` of samples, one a row, for the trainers of transformers and TRL.

    The columns are `input_ids`, `labels` (-100 on context) and `key`, and `loss_weights` if a
    weight of one of them is neither 0 nor 1.

    Raises:
        DataError: no samples, or the package datasets is missing.
    """
    need_packages("to_dataset", "datasets")
    from datasets import Dataset

    listed = list(samples)
    if not listed:
        raise DataError("to_dataset got no samples; render some with render_samples")
    weighted = any(map(is_weighted, listed))
    return Dataset.from_list([sample_row(sample, weighted=weighted) for sample in listed])
