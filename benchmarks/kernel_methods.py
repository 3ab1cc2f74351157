"""The methods that compute attention of a packed row and are compared, each with its best settings.

A method that cannot run here raises, and the caller writes down why: none is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_runs import Inputs, Results, owned_tokens
from benchmarks.kernel_rows import KernelRow
from flexmask.backends.api import dispatch
from flexmask.backends.flex import kept_graphs
from flexmask.backends.flex_options import has_flash
from flexmask.tree.intervals import MaskMod

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_BLOCK = 128  # tokens on a side of FlexAttention's tiles
_MAX_DENSE = 2**31 - 1  # pairs


class LeftOutError(Exception):
    """A method that cannot run here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method on one row.

    Attributes:
        inputs: its own leaves, in its own order.
        attend: from q, k and v to the output.
        index: int64 [T], the packed place of each of its tokens; None in packed order.
        no_backward: why there is no backward pass, or None.
    """

    inputs: Inputs
    attend: Attend
    index: Tensor | None = None
    no_backward: str | None = None

    def forward(self) -> Tensor:
        """The output, in the method's own order; with a graph for `backward` if there is one."""
        if self.no_backward is None:
            return self.attend(*self.inputs[:3])
        with torch.no_grad():
            return self.attend(*(x.detach() for x in self.inputs[:3]))

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v; may be called again for the same output."""
        with kept_graphs():
            return torch.autograd.grad(out, self.inputs[:3], self.inputs.dout, retain_graph=True)

    def results(self, num_tokens: int) -> Results:
        """Output and gradients in packed order; the output alone without a backward pass."""
        out = self.forward()
        gradients = () if self.no_backward else self.backward(out)
        if self.index is None:
            return out.detach(), *gradients
        packed: list[Tensor] = []
        for x in (out.detach(), *gradients):
            B, H, _, D = x.shape
            total = torch.zeros(B, num_tokens, H, D, dtype=torch.float32, device=x.device)
            if packed:
                total.index_add_(1, self.index, x.transpose(1, 2).float())
            else:  # the output of a token is the same in every sample
                total[:, self.index] = x.transpose(1, 2).float()
            packed.append(total.transpose(1, 2))
        return tuple(packed)


def build_method(name: str, row: KernelRow, inputs: Inputs) -> Method:
    """The method `name`, one of METHODS, for a row; inputs are in packed order, and its leaves.

    Raises:
        LeftOutError: it cannot run here.
    """
    return _BUILDERS[name](row, inputs)


def _ours(backend: str, row: KernelRow, inputs: Inputs, **options: Any) -> Method:
    end = row.mask.subtree_end.to(inputs.q.device)
    return Method(inputs, lambda q, k, v: dispatch(q, k, v, end, backend=backend, **options))


def _triton_split(row: KernelRow, inputs: Inputs) -> Method:
    fast = _ours("triton", row, inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # what the setting tells us, without the filling of memory that it does besides
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
            return fast.attend(q, k, v)

    return Method(inputs, attend)


def _flex_backend(row: KernelRow, inputs: Inputs, **options: Any) -> Method:
    """What users get: lengths are symbols, and the tiles are inductor's own."""
    if not inputs.q.is_cuda:
        raise LeftOutError("backend flex has no backward pass on CPUs; `forward` has it")
    return _ours("flex", row, inputs, **options)


def _flex(row: KernelRow, inputs: Inputs, **options: Any) -> Method:
    return _flex_method(inputs, row.mask.to(inputs.q.device).mask_mod, options)


def _flex_tma(row: KernelRow, inputs: Inputs) -> Method:
    if not inputs.q.is_cuda or torch.cuda.get_device_capability() < (9, 0):
        raise LeftOutError("USE_TMA needs a Hopper GPU or a newer one")
    return _flex(row, inputs, USE_TMA=True)


def _flex_flash(row: KernelRow, inputs: Inputs) -> Method:
    if not has_flash():
        raise LeftOutError("BACKEND='FLASH' needs the package flash-attn-4, which is not installed")
    return _flex_backend(row, inputs, kernel_options={"BACKEND": "FLASH"})


def _flex_paper(row: KernelRow, inputs: Inputs) -> Method:
    """The paper's order: a token is an ancestor where its range in preorder holds the other's."""
    device = inputs.q.device
    index = row.paper_order.to(device)
    mask_mod = ancestor_mask(index.to(torch.int32), row.mask.subtree_end[0].to(device)[index])
    own = inputs.at(index, torch.ones_like(index, dtype=torch.bool))
    return replace(_flex_method(own, mask_mod, {}), index=index)


def ancestor_mask(place: Tensor, end: Tensor) -> MaskMod:
    """The mask of tokens in any order, from the packed place of each and its subtree's end, [L]."""

    def is_ancestor(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (place[kv_idx] <= place[q_idx]) & (place[q_idx] < end[kv_idx])

    return is_ancestor


def _flex_method(inputs: Inputs, mask_mod: MaskMod, options: dict[str, Any]) -> Method:
    """FlexAttention, compiled for each length and set of options by itself."""
    block_mask = make_block_mask(mask_mod, inputs.q.shape[2], inputs.q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with (
            torch._dynamo.config.patch(recompile_limit=64),
            functorch_config.patch(donated_buffer=False),
        ):
            return _compiled_flex_attention()(
                q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options=options
            )

    no_backward = None if inputs.q.is_cuda else "FlexAttention has no backward pass on CPUs"
    return Method(inputs, attend, no_backward=no_backward)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """With the most thorough choice of tiles on a GPU."""
    mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else None
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)


def make_block_mask(mask_mod: MaskMod, length: int, device: torch.device) -> BlockMask:
    """The block mask of any mask, from a line of tiles at a time.

    Its index tables have as many columns as there are blocks, so that rows of one length share a
    compiled kernel.
    """
    token = torch.arange(-(-length // _BLOCK) * _BLOCK, device=device)
    key, zero = token.clamp(max=length - 1), token[0]
    some, every = [], []
    for query in token.view(-1, _BLOCK, 1):
        seen = mask_mod(zero, zero, query.clamp(max=length - 1), key)
        tiles = (seen & (query < length) & (token < length)).view(_BLOCK, -1, _BLOCK)
        some.append(tiles.any(2).any(0))
        every.append(tiles.all(2).all(0))
    full = torch.stack(every)
    (partial_counts, partials), (full_counts, fulls) = map(
        _columns, (torch.stack(some) & ~full, full)
    )
    return BlockMask.from_kv_blocks(
        partial_counts,
        partials,
        full_counts,
        fulls,
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _columns(grid: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each line of a grid [N, N] are set, and these columns first."""
    order = grid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return grid.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _dense(row: KernelRow, inputs: Inputs) -> Method:
    q = inputs.q
    L, size = q.shape[2], q.element_size()
    if L**2 > _MAX_DENSE:
        raise LeftOutError(
            f"the mask of {L:,} tokens takes {L**2 * size / 2**30:.0f} GiB, and its "
            "strides do not fit the 32 bits of torch's kernels"
        )
    visible = row.mask.to(q.device).to_dense().unsqueeze(1)
    added = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    added.masked_fill_(~visible, float("-inf"))
    del visible
    group = q.shape[1] // inputs.k.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # its kernels take no groups
        if not q.is_cuda:
            return scaled_dot_product_attention(q, k, v, attn_mask=added)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return scaled_dot_product_attention(q, k, v, attn_mask=added)

    return Method(inputs, attend)


def _npass(row: KernelRow, inputs: Inputs) -> Method:
    """The samples end to end, each causal by itself: the flash kernel of torch, or one by one."""
    device = inputs.q.device
    index = torch.cat(row.samples).to(device)
    lengths = [x.numel() for x in row.samples]
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def attend_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
        longest = max(lengths)
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )[0]
        return out.transpose(0, 1).unsqueeze(0)

    def attend_one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        attend = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return torch.cat([attend(*part) for part in parts], 2)

    is_owned = torch.cat(owned_tokens(row.samples, row.mask.shape[1])).to(device)
    attend = attend_packed if inputs.q.is_cuda else attend_one_by_one
    return Method(inputs.at(index, is_owned), attend, index)


_BUILDERS: dict[str, Callable[[KernelRow, Inputs], Method]] = {
    "triton": partial(_ours, "triton"),
    "triton_split": _triton_split,
    "varlen": partial(_ours, "varlen"),
    "flex_backend": _flex_backend,
    "flex": _flex,
    "npass": _npass,
    "dense": _dense,
    "flex_paper": _flex_paper,
    "flex_tma": _flex_tma,
    "flex_flash": _flex_flash,
}
METHODS = {
    "triton": "triton, fast",
    "triton_split": "triton, deterministic",
    "varlen": "varlen",
    "flex_backend": "flex",
    "flex_flash": "flex, FLASH",
    "flex": "FlexAttention, tuned",
    "flex_tma": "FlexAttention, tuned, TMA",
    "flex_paper": "FlexAttention, paper's order",
    "dense": "SDPA, dense mask",
    "npass": "packed N-pass, flash",
}
