"""Attention of one packed row on the CPU, forward and backward, call by call.

Heads are kept as [H_kv, G], the batch and the head dimension of the kernel: the G heads of a group
read the same keys and values through a stride of 0. Without a softcap, each call is one of a flash
kernel; with one, the calls are cut into blocks and computed in plain PyTorch (see `cpu_capped`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flexmask.backends.calls import Call, Keys, Pairs, cut_calls
from flexmask.backends.cpu_capped import Block, capped_backward, capped_forward
from flexmask.backends.reference import precise_dtype
from flexmask.backends.sinks import add_sinks

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Row(NamedTuple):
    """One packed row: q [H_kv, G, L, D], k and v [H_kv, L, D], its mask and options.

    `calls` cover its visible pairs; `visible` tells of tensors of queries and keys which they are.
    `sinks` is [H_kv, G, 1] or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    calls: tuple[Call, ...]
    visible: Callable[[Tensor, Tensor], Tensor]
    sinks: Tensor | None
    scale: float
    softcap: float | None


def row_forward(row: Row, out: Tensor, lse: Tensor) -> None:
    """Fill out [H_kv, G, L, D] and its logsumexp [H_kv, G, L], both in fp32 or fp64."""
    for call in _calls(row):
        part, part_lse = _attend(row, call)
        out_rows, lse_rows = out[:, :, call.rows], lse[:, :, call.rows]
        if call.is_first:
            out_rows.copy_(part)
            lse_rows.copy_(part_lse)
        else:
            weight = torch.sigmoid(part_lse - lse_rows).unsqueeze(-1)
            out_rows.lerp_(part.to(out.dtype), weight)
            torch.logaddexp(lse_rows, part_lse, out=lse_rows)
    if row.sinks is not None:
        add_sinks(out, lse, row.sinks)


def row_backward(
    row: Row,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fill dq [H_kv, G, L, D], and add to dk and dv [H_kv, L, D]; all three in fp32 or fp64.

    Args:
        row: the inputs of the forward pass.
        dout: gradients of its output [H_kv, G, L, D].
        out: its merged output [H_kv, G, L, D].
        lse: its merged logsumexp [H_kv, G, L].
        dq: where the gradients of the queries go.
        dk: sums of the gradients of the keys, zeros at first.
        dv: sums of the gradients of the values, zeros at first.
    """
    for call in _calls(row):
        results = (x[:, :, call.rows] for x in (dout, out, lse))
        part, *key_parts = _attend_backward(row, call, *results)
        if call.is_first:
            dq[:, :, call.rows] = part
        else:
            dq[:, :, call.rows] += part
        for total, key_part in zip((dk, dv), key_parts, strict=True):
            total[:, call.keys] += _sum_group(key_part, total.dtype)


def _calls(row: Row) -> Iterable[Call]:
    return row.calls if row.softcap is None else cut_calls(row.calls)


def _attend(row: Row, call: Call) -> tuple[Tensor, Tensor]:
    """Out [H_kv, G, R, D] and logsumexp [H_kv, G, R] of a call, normalised over its keys only."""
    q, k, v = _operands(row, call)
    if call.pairs is Pairs.SELF:
        return v, _self_scores(row, _precise(q), _precise(k))
    if row.softcap is not None:
        return capped_forward(_block(row, call, row.softcap))
    return _flash(
        q,
        k,
        v,
        0.0,
        call.pairs is Pairs.CAUSAL,
        attn_mask=_additive_mask(row, call),
        scale=row.scale,
    )


def _attend_backward(
    row: Row, call: Call, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A call's share of dq [H_kv, G, R, D] and of dk and dv, each [H_kv, G, K, D]."""
    q, k, v = _operands(row, call)
    if call.pairs is Pairs.SELF:
        dout, q, k, v, out = map(_precise, (dout, q, k, v, out))
        return _self_backward(row, dout, q, k, v, out, lse)
    if row.softcap is not None:
        return capped_backward(_block(row, call, row.softcap), dout, out, lse)
    return _flash_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        0.0,
        call.pairs is Pairs.CAUSAL,
        attn_mask=_additive_mask(row, call),
        scale=row.scale,
    )


def _self_scores(row: Row, q: Tensor, k: Tensor) -> Tensor:
    """The scores of tokens with themselves."""
    scores = row.scale * (q * k).sum(-1)
    return scores if row.softcap is None else row.softcap * torch.tanh(scores / row.softcap)


def _self_backward(
    row: Row, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of tokens that see themselves only (and a sink, if there is one)."""
    scores = _self_scores(row, q, k).unsqueeze(-1)
    weight = torch.exp(scores - lse.unsqueeze(-1))
    dscore = row.scale * weight * (dout * (v - out)).sum(-1, keepdim=True)
    if row.softcap is not None:
        dscore *= 1 - (scores / row.softcap).square()
    return dscore * k, dscore * q, weight * dout


def _block(row: Row, call: Call, softcap: float) -> Block:
    """The operands of a call whose scores are held in memory."""
    seen = None
    if call.pairs is Pairs.MASKED:
        seen = _seen(row, call)
    elif call.pairs is Pairs.CAUSAL:
        seen = torch.ones(2 * (call.stop - call.start,), dtype=torch.bool).tril_()
    k, v = (_take(x, call.keys) for x in row[1:3])
    return Block(row.q[:, :, call.rows], k, v, seen, row.scale, softcap)


def _additive_mask(row: Row, call: Call) -> Tensor | None:
    """0 where a query of the call sees a key, -inf elsewhere: [R, K]; None if not MASKED."""
    if call.pairs is not Pairs.MASKED:
        return None
    seen = _seen(row, call)
    return torch.zeros(seen.shape, dtype=row.q.dtype).masked_fill_(~seen, float("-inf"))


def _seen(row: Row, call: Call) -> Tensor:
    """Which queries of a call see which of its keys, bool [R, K]."""
    index = torch.arange(row.q.shape[2])
    return row.visible(index[call.rows].unsqueeze(-1), index[call.keys])


def _operands(row: Row, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The call's q [H_kv, G, R, D], and k and v [H_kv, G, K, D] with stride 0 over the group."""
    q = row.q[:, :, call.rows]
    k, v = (_take(x, call.keys).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in row[1:3])
    return q, k, v


def _take(x: Tensor, keys: Keys) -> Tensor:
    """The tokens `keys` of x [H_kv, L, D]; a view if they are a run."""
    return x[:, keys] if isinstance(keys, slice) else x.index_select(1, keys)


def _sum_group(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum [H_kv, G, K, D] over the group, without a copy if it has one head."""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1, dtype=dtype)


def _precise(x: Tensor) -> Tensor:
    return x.to(precise_dtype(x))
