"""The ways to compute attention of a packed row that are compared, each with its best settings.

A way that cannot run here raises, and the caller writes down why: none is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.attention_runs import Inputs, Results
from benchmarks.kernel_rows import KernelRow
from flexmask.backends import flex
from flexmask.backends.api import dispatch
from flexmask.backends.flex_tables import BLOCK, BlockTables, tables_from_ranges, tables_of_tiles
from flexmask.backends.kept_graphs import kept_graphs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_SAFE = {"ROWS_GUARANTEED_SAFE": True}  # every token sees itself
_MAX_DENSE = 2**31 - 1  # pairs


class LeftOutError(Exception):
    """A way that cannot run here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute one row.

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
        """The output, in the way's own order; with a graph for `backward` where there is one."""
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
            total = torch.zeros(
                (x.shape[0], num_tokens, x.shape[1], x.shape[3]),
                dtype=torch.float32,
                device=x.device,
            )
            if packed:
                total.index_add_(1, self.index, x.transpose(1, 2).float())
            else:  # the output of a token is the same in every sample
                total[:, self.index] = x.transpose(1, 2).float()
            packed.append(total.transpose(1, 2))
        return tuple(packed)


def build_way(name: str, row: KernelRow, inputs: Inputs) -> Way:
    """The way `name`, one of WAYS, for a row; inputs are in packed order, and its leaves.

    Raises:
        LeftOutError: it cannot run here.
    """
    return _BUILDERS[name](row, inputs)


def _triton(row: KernelRow, inputs: Inputs) -> Way:
    end = row.mask.subtree_end.to(inputs.q.device)
    return Way(inputs, lambda q, k, v: dispatch(q, k, v, end, backend="triton"))


def _triton_split(row: KernelRow, inputs: Inputs) -> Way:
    way = _triton(row, inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # what the setting tells us, without the filling of memory that it does besides
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
            return way.attend(q, k, v)

    return Way(inputs, attend)


def _flex(options: dict[str, Any]) -> Callable[[KernelRow, Inputs], Way]:
    def build(row: KernelRow, inputs: Inputs) -> Way:
        end = row.mask.subtree_end.to(inputs.q.device)
        tables = _wide(tables_from_ranges(end))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shared = (q.shape[3] ** -0.5, None, options)
            return _compiled(flex._attend, q, k, v, end, None, None, tables, None, *shared)

        return Way(inputs, attend, no_backward=_no_flex_backward(inputs))

    return build


def _flex_tma(row: KernelRow, inputs: Inputs) -> Way:
    if not inputs.q.is_cuda or torch.cuda.get_device_capability() < (9, 0):
        raise LeftOutError("USE_TMA needs a Hopper GPU or a newer one")
    return _flex(_SAFE | {"USE_TMA": True})(row, inputs)


def _flex_flash(row: KernelRow, inputs: Inputs) -> Way:
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise LeftOutError("BACKEND='FLASH' needs the package flash-attn-4, which is not installed")
    return _flex({"BACKEND": "FLASH"})(row, inputs)


def _flex_paper(row: KernelRow, inputs: Inputs) -> Way:
    """The paper's order: a token is an ancestor where its range in preorder holds the other's."""
    device = inputs.q.device
    index = row.paper_order.to(device)
    enter = index.to(torch.int32)  # the packed order is a preorder
    leave = row.mask.subtree_end[0].to(device)[index]
    tables = _wide(_tables_of_ancestors(enter, leave))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compiled(_attend_to_ancestors, q, k, v, enter, leave, tables, _SAFE)

    own = inputs.at(index, torch.ones_like(index, dtype=torch.bool))
    return Way(own, attend, index, _no_flex_backward(inputs))


def _dense(row: KernelRow, inputs: Inputs) -> Way:
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

    return Way(inputs, attend)


def _npass(row: KernelRow, inputs: Inputs) -> Way:
    """The samples end to end, each causal by itself: the flash kernel of torch, or one by one."""
    device = inputs.q.device
    index = torch.cat(row.samples).to(device)
    owner = torch.full((row.mask.shape[1],), len(row.samples), device=device)
    number = torch.repeat_interleave(
        torch.arange(len(row.samples), device=device),
        torch.tensor([x.numel() for x in row.samples], device=device),
    )
    owner.scatter_reduce_(0, index, number, "amin")  # of a shared token: the first sample
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

    whole = inputs.at(index, torch.ones_like(owner, dtype=torch.bool))
    is_owned = (owner[index] == number)[:, None]
    own = Inputs(*whole[:3], whole.dout * is_owned)
    return Way(own, attend_packed if inputs.q.is_cuda else attend_one_by_one, index)


def _compiled(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """The result of the function, compiled for these shapes and options by themselves."""
    with (
        torch._dynamo.config.patch(recompile_limit=64, specialize_float=True),
        functorch_config.patch(donated_buffer=False),
    ):
        return _compile(function)(*arguments)


@cache
def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the most thorough choice of tiles on a GPU."""
    mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else None
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def _attend_to_ancestors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    enter: Tensor,
    leave: Tensor,
    tables: BlockTables,
    options: Any,
) -> Tensor:
    length = q.shape[2]

    def is_ancestor(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = enter[q_idx]
        return (enter[kv_idx] <= place) & (place < leave[kv_idx])

    mask = BlockMask(
        seq_lengths=(length, length),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_ancestor,
        **tables._asdict(),
    )
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def _tables_of_ancestors(enter: Tensor, leave: Tensor) -> BlockTables:
    """The block tables of the mask in any order, a line of tiles at a time."""
    missing = -enter.numel() % BLOCK
    enter = pad(enter, (0, missing), value=2**30)  # sees nothing, is seen by nothing
    leave = pad(leave, (0, missing), value=0)
    visited, full = [], []
    for place in enter.view(-1, BLOCK, 1):
        seen = ((enter <= place) & (place < leave)).view(BLOCK, -1, BLOCK)
        visited.append(seen.any(2).any(0))
        full.append(seen.all(2).all(0))
    is_full = torch.stack(full)[None]
    return tables_of_tiles(torch.stack(visited)[None] & ~is_full, is_full)


def _wide(tables: BlockTables) -> BlockTables:
    """Index tables of N columns in memory of their own: one shape, and one compiled kernel."""
    num_blocks = tables.kv_num_blocks.shape[2]
    return BlockTables(
        *(
            x.contiguous() if x.ndim == 3 else pad(x, (0, num_blocks - x.shape[3])).contiguous()
            for x in tables
        )
    )


def _no_flex_backward(inputs: Inputs) -> str | None:
    return None if inputs.q.is_cuda else "FlexAttention has no backward pass on CPUs"


_BUILDERS: dict[str, Callable[[KernelRow, Inputs], Way]] = {
    "triton": _triton,
    "triton_split": _triton_split,
    "flex": _flex(_SAFE),
    "npass": _npass,
    "dense": _dense,
    "flex_paper": _flex_paper,
    "flex_tma": _flex_tma,
    "flex_flash": _flex_flash,
}
WAYS = {
    "triton": "flexmask, fast",
    "triton_split": "flexmask, deterministic",
    "flex": "FlexAttention",
    "flex_tma": "FlexAttention, TMA",
    "flex_flash": "FlexAttention, FLASH",
    "flex_paper": "FlexAttention, paper's order",
    "dense": "SDPA, dense mask",
    "npass": "packed N-pass, flash",
}
