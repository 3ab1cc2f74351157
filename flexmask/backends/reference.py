"""Dense attention in plain PyTorch: what every other backend is checked against.

For query q, head h and the keys k that it sees, with s = scale * q . k:

    out_q = sum_k exp(t_k) v_k / (sum_k exp(t_k) + exp(sink_h)),    t = softcap * tanh(s / softcap)

where the sink is left out without `sinks`, and t = s without `softcap`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmask.errors import UnsupportedModelError
from flexmask.tree.intervals import dense_mask

MAX_TOKENS = 8192  # a dense row of this length already holds 64 million scores a head


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with all L x L scores in memory; fp64 in fp64, everything else in fp32.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, H_kv, L, D]; a group of H / H_kv query heads shares one.
        v: values [B, H_kv, L, D_v].
        subtree_end: int [B, L] or [1, L].
        window_start: like `subtree_end`, the first token that a query sees; None for all.
        scale: factor of the scores.
        softcap: bound of the scores, or None.
        sinks: one more logit [H] in each softmax's denominator, or None.

    Returns:
        [B, H, L, D_v] in the dtype of q.

    Raises:
        UnsupportedModelError: more than MAX_TOKENS tokens in a row.
    """
    length = q.shape[2]
    if length > MAX_TOKENS:
        raise UnsupportedModelError(
            f"backend 'reference' takes rows of at most {MAX_TOKENS} tokens, got {length}; "
            "use backend='cpu' or 'flex'"
        )
    precise = precise_dtype(q)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(precise).repeat_interleave(group, dim=1) for x in (k, v))
    scores = scale * (q.to(precise) @ keys.transpose(-1, -2))  # [B, H, L, L]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = dense_mask(subtree_end, window_start).unsqueeze(1)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = sinks.to(precise).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    return (weights @ values).to(q.dtype)


def precise_dtype(x: Tensor) -> torch.dtype:
    """What is computed in for a tensor: fp64 for fp64, fp32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
