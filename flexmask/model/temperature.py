"""The temperature of llama4's layers without rotary embedding, counted along the tree.

These layers scale each query by

    t(p) = 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)),

with p its place in the row, where a separate sequence has its position. Before our attention runs,
each query is given the factor of its own position instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Temperature:
    """The factor of the queries: `scale` as llama4's attn_scale, `step` as its floor_scale."""

    scale: float
    step: float

    def __call__(self, positions: Tensor) -> Tensor:
        """t(p) of `positions`, in fp32."""
        return torch.log1p(torch.floor((positions.float() + 1.0) / self.step)) * self.scale + 1.0

    def correct(self, query: Tensor, position_ids: Tensor) -> Tensor:
        """The query [B, H, L, D], scaled by place in the row, scaled by position_ids [B, L]."""
        place = torch.arange(query.shape[2], device=query.device)
        factor = self(position_ids) / self(place)
        return (query * factor[:, None, :, None]).to(query.dtype)


def temperature_of(layer: nn.Module) -> Temperature | None:
    """The temperature that an attention module puts into its queries by place, or None."""
    if not getattr(layer, "attn_temperature_tuning", False) or getattr(layer, "use_rope", True):
        return None
    settings: Any = layer
    return Temperature(settings.attn_scale, settings.floor_scale)
