"""N-pass, the oracle: the samples one by one, as plain sequences, through an unpatched model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor


def npass_batches(samples: Sequence[Sample]) -> Iterator[dict[str, Tensor]]:
    """One batch per sample, for a model that flexmask has not touched.

    Yields:
        Tensors [1, n]: `input_ids`, `position_ids`, `labels` and `shift_labels` (the same values),
        int64, and `loss_weights` float32 unless each is 0 or 1; no padding, no attention mask.
    """
    import torch

    for sample in samples:
        weights = np.append(sample.loss_weights[1:], 0.0)
        following = np.append(sample.input_ids[1:], IGNORE_INDEX)
        labels = torch.from_numpy(np.where(weights > 0, following, IGNORE_INDEX))[None]
        batch = {
            "input_ids": torch.from_numpy(sample.input_ids)[None],
            "position_ids": torch.arange(len(sample))[None],
            "labels": labels,
            "shift_labels": labels.clone(),
        }
        if not np.isin(weights, (0, 1)).all():
            batch["loss_weights"] = torch.from_numpy(weights)[None].float()
        yield batch
