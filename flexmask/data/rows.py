"""Samples as rows for other trainers: one sequence a row, which trained alone is N-pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flexmask.errors import DataError
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample


def sample_row(sample: Sample) -> dict[str, Any]:
    """A sample as plain data.

    `input_ids` and `labels` are lists of equal length: a label is the token of its own place, -100
    where that is context (models shift labels by themselves). `loss_weights` are there only if one
    is neither 0 nor 1, `key` is the sample's.
    """
    weights = sample.loss_weights.copy()
    weights[0] = 0  # nothing predicts the first token
    row = {
        "input_ids": sample.input_ids.tolist(),
        "labels": np.where(weights > 0, sample.input_ids, IGNORE_INDEX).tolist(),
    }
    if not np.isin(weights, (0, 1)).all():
        row["loss_weights"] = weights.tolist()
    return row | {"key": sample.key}


def to_dataset(samples: Iterable[Sample]) -> Any:
    """A `datasets.Dataset` of the rows of `sample_row`, for the trainers of transformers and TRL.

    If one sample has loss weights other than 0 and 1, all rows have them.

    Raises:
        DataError: no samples, or the package datasets is missing.
    """
    try:
        from datasets import Dataset
    except ImportError:
        raise DataError("to_dataset needs the package datasets; pip install datasets") from None
    listed = list(samples)
    rows = list(map(sample_row, listed))
    if not rows:
        raise DataError("to_dataset got no samples; render some with render_samples")
    if any("loss_weights" in row for row in rows):
        for row, sample in zip(rows, listed, strict=True):
            row["loss_weights"] = [0.0, *sample.loss_weights[1:].tolist()]
    return Dataset.from_list(rows)
