"""Tree attention on FlashAttention's own kernels: one causal varlen call for a batch.

The kernels are those inside torch (`aten._flash_attention_forward`, FlashAttention 2, arXiv
2307.08691), or what `torch.nn.attention.activate_flash_attention_impl` has put in their place. They
take queries and keys by cumulative lengths of their own: `varlen_plan` says why that is enough.

The backward pass calls the kernels' own on the same layout, with the merged out and logsumexp where
there are sinks (see `sinks`), and adds the gradients of gathered keys up in fp32. Autograd of
`torch.nn.attention.varlen.varlen_attn` would drop the gradient of its logsumexp.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexmask.backends.cache import constant_in_graphs, is_capturing, per_mask_cache
from flexmask.backends.reference import precise_dtype
from flexmask.backends.sinks import add_sinks, sink_gradient
from flexmask.backends.varlen_plain import plain_backward, plain_forward
from flexmask.backends.varlen_plan import Group, plan_groups
from flexmask.errors import UnsupportedModelError

MAX_WIDTH = 256
GROUP_BYTES = 2**30  # what the gathered keys of one call, and what follows from them, may take
_BLOCK_ROWS = 128  # the backward kernel leaves so many rows of dq free behind each sequence

_operator = partial(
    torch.library.custom_op,
    mutates_args=(),
    device_types=("cuda", "cpu"),
    tags=(torch.Tag.cudagraph_unsafe,),  # the plan waits for the device
)


def why_not(
    device: torch.device, dtype: torch.dtype, width: int, softcap: float | None
) -> str | None:
    """What the kernels take, where a call is something else; None for a call that they can do.

    Args:
        device: of q, k and v.
        dtype: of q, k and v.
        width: of the widest head.
        softcap: bound of the scores, or None.
    """
    if softcap is not None:
        return "no softcap"
    if width > MAX_WIDTH:
        return f"heads at most {MAX_WIDTH} wide, got {width}"
    if device.type != "cuda":
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"bf16 and fp16, got {dtype}"
    if not torch.compiler.is_compiling() and is_capturing():
        return "no part in the capture of a CUDA graph: it has to read the mask"
    return _why_not_on(device)


@constant_in_graphs
def _why_not_on(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # asked about a machine that is not this one
    if torch.version.hip is not None:
        return "NVIDIA GPUs alone"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"GPUs of compute capability 8.0 or above, got {major}.{minor}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "a torch that was built with FlashAttention"
    return None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`reference_attention` by FlashAttention's kernels, forward and backward, in O(L) memory.

    It takes a window or chunk as numbers of positions, not as the first token that a query sees.
    Where D_v is not D, the narrower are padded with zeros, as are both to a multiple of 8. CPU
    tensors are for tests: there a plain evaluation stands in for the kernels.

    Raises:
        UnsupportedModelError: what the kernels do not take, see `why_not`.
    """
    widest, value_width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if (taken := why_not(q.device, q.dtype, widest, softcap)) is not None:
        raise UnsupportedModelError(f"backend 'varlen' takes {taken}; use backend='flex'")
    width = padded_width(widest)
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out, _ = _forward(q, k, v, subtree_end, sinks, scale, window, chunk)
    return out[..., :value_width]


def padded_width(width: int) -> int:
    """The next width that the kernels take: a multiple of 8, and 256 above 192.

    Between them FlashAttention 2 has no backward pass on consumer GPUs, and computes 256 columns.
    """
    return MAX_WIDTH if width > 192 else -(-width // 8) * 8


def plan_calls(
    subtree_end: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    window: int | None = None,
    chunk: int | None = None,
    is_backward: bool = False,
) -> list[Group]:
    """The calls of the kernels for a batch, made once for all layers.

    Args:
        subtree_end: int [B, L].
        q: queries [B, H, L, D]; shape and dtype are looked at alone, here and below.
        k: keys [B, H_kv, L, D].
        window: a query sees only keys less than `window` positions before it; None for all.
        chunk: a query sees only keys of its own chunk of `chunk` positions; None for all.
        is_backward: plan the backward pass, whose kernel takes more memory.
    """
    H, D, H_kv, size = q.shape[1], q.shape[3], k.shape[1], k.itemsize
    key_bytes, sequence_bytes = 2 * H_kv * D * size, 0  # K and V
    if is_backward:
        # dk and dv, for all heads where there are groups of them, and once more in fp32
        key_bytes += 2 * H_kv * D * (size + 4) + (H_kv != H) * 2 * H * D * size
        sequence_bytes = 4 * _BLOCK_ROWS * H * D
    groups: list[Group] = per_mask_cache(
        plan_groups,
        subtree_end,
        window=window,
        chunk=chunk,
        key_bytes=key_bytes,
        sequence_bytes=sequence_bytes,
        budget=GROUP_BYTES,
    )
    return groups


@_operator("flexmask::varlen_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention as out [B, H, L, D] and logsumexp [H, B * L], the latter in fp32 or fp64."""
    B = q.shape[0]
    groups = plan_calls(subtree_end.expand(B, -1), q, k, window=window, chunk=chunk)
    q, k, v = (_flat(x) for x in (q, k, v))
    parts = []
    for group in groups:
        keys, values = (_take(x, group) for x in (k, v))
        attend = torch.ops.aten._flash_attention_forward if q.is_cuda else plain_forward
        part, part_lse, *_ = attend(
            q[group.rows],
            keys,
            values,
            *group[2:6],
            0.0,
            True,
            False,
            **_options(group, scale),
        )
        parts.append((part, part_lse))
    out, lse = parts[0] if len(parts) == 1 else _joined(parts)
    if sinks is not None:
        add_sinks(out, lse.mT, sinks.to(lse.dtype))
    return _unflat(out.contiguous(), B), lse


@_operator("flexmask::varlen_attention_backward")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    B = q.shape[0]
    groups = plan_calls(
        subtree_end.expand(B, -1), q, k, window=window, chunk=chunk, is_backward=True
    )
    dout, q, k, v, out = (_flat(x) for x in (dout, q, k, v, out))
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout
    precise = precise_dtype(k)
    dq, dk, dv = q.new_empty(q.shape), *(x.new_zeros(x.shape, dtype=precise) for x in (k, v))
    for group in groups:
        keys, values = (_take(x, group) for x in (k, v))
        attend = torch.ops.aten._flash_attention_backward if q.is_cuda else plain_backward
        part, *key_parts = attend(
            dout[group.rows],
            q[group.rows],
            keys,
            values,
            out[group.rows],
            lse[:, group.rows].contiguous(),
            *group[2:6],
            0.0,
            True,
            unused,
            unused,
            **_options(group, scale),
        )
        dq[group.rows] = part
        for total, key_part in zip((dk, dv), key_parts, strict=True):
            if isinstance(group.keys, slice):
                total[group.keys] = key_part
            else:
                total.index_add_(0, group.keys, key_part.to(precise))
    return _unflat(dq, B), _unflat(dk.to(k.dtype), B), _unflat(dv.to(v.dtype), B)


@_forward.register_fake
def _(q, k, v, subtree_end, sinks, scale, window, chunk):
    B, H, L, D = q.shape
    out = q.new_empty(B, L, H, D).transpose(1, 2)
    return out, q.new_empty(H, B * L, dtype=precise_dtype(q))


@_backward.register_fake
def _(dout, q, k, v, subtree_end, out, lse, scale, window, chunk):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.window, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout: Tensor, _: Tensor | None):
    q, k, v, end, sinks, out, lse = ctx.saved_tensors
    options = (ctx.scale, ctx.window, ctx.chunk)
    dq, dk, dv = _backward(dout, q, k, v, end, out, lse, *options)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[4]:
        B = q.shape[0]
        dsinks = sink_gradient(dout, out, lse.unflatten(1, (B, -1)).transpose(0, 1), sinks)
    return dq, dk, dv, None, dsinks, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _options(group: Group, scale: float) -> dict[str, Any]:
    return {"scale": scale, "window_size_left": group.window_left, "window_size_right": 0}


def _flat(x: Tensor) -> Tensor:
    """View x [B, heads, L, D] as [B * L, heads, D]; copy it where the last stride is not 1."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _unflat(x: Tensor, batch: int) -> Tensor:
    """View x [B * L, heads, D] as [B, heads, L, D]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _take(x: Tensor, group: Group) -> Tensor:
    """The keys of a group, of x [B * L, heads, D]; a view if they are its rows."""
    return x[group.keys] if isinstance(group.keys, slice) else x.index_select(0, group.keys)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Out and logsumexp of all groups, which stand in the order of their rows."""
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse, 1)
