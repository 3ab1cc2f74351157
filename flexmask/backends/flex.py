"""FlexAttention with block tables built directly: CUDA, and forward passes on the CPU.

Dong et al., arXiv 2412.05496. Eager callers share one compiled function; inside `torch.compile` the
same function is traced into the caller's graph. Masks, lengths and batch sizes are inputs of the
graph, so a new mask does not compile again; head counts, head widths, dtypes and options do. Rows
of whole blocks, and rows below one, have graphs of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.fx.experimental import _config as fx_config
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    flex_attention,
)

from flexmask.backends.cache import constant_in_graphs
from flexmask.backends.flex_options import Chip, complete, flash_block
from flexmask.backends.flex_tables import BLOCK, block_tables, split_rows
from flexmask.errors import UnsupportedModelError
from flexmask.tree.block_mask import BlockTables
from flexmask.tree.intervals import flat_mask_mod, mask_mod

MIN_WIDTH = 16  # of a head, for the tensor cores
MAX_COMPILES = 64  # of one process: combinations of dtypes, head counts, widths and options


def flex_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel_options: Mapping[str, Any] | None = None,
) -> Tensor:
    """`reference_attention` by FlexAttention; differentiable, and with sinks, on CUDA only.

    `kernel_options` are FlexAttention's own, such as block sizes, as `check_kernel_options` takes
    them.

    Raises:
        UnsupportedModelError: fp64, narrow heads on CUDA; gradients or sinks on the CPU; what the
            FLASH kernels do not take.
    """
    _check(q, k, v, sinks)
    is_nvidia = q.device.type == "cuda" and torch.version.hip is None
    chip = chip_of(q.device) if is_nvidia else None
    shape = (q.shape[-1], v.shape[-1], q.dtype)
    options = complete(kernel_options, chip, *shape)
    block = (BLOCK, BLOCK)
    if options.get("BACKEND") == "FLASH":
        block = flash_block(chip, *shape, has_sinks=sinks is not None)
    attend = _attend if torch.compiler.is_compiling() else _attend_eagerly

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        end: Tensor,
        start: Tensor | None,
        tables: BlockTables,
    ) -> Tensor:
        return attend(
            q,
            k,
            v,
            end.clone(memory_format=torch.contiguous_format),  # not a view: its base is guarded on
            start,
            tables,
            sinks,
            scale,
            softcap,
            block,
            options,
        )

    tables = block_tables(subtree_end, window_start, block)
    if q.device.type != "cpu":
        return run(q, k, v, subtree_end, window_start, tables)
    # On the CPU row by row: torch 2.13 generates C++ that does not compile for a dynamic batch.
    # Detached, because FlexAttention refuses tensors that require gradients even under no_grad.
    B, L = q.shape[0], q.shape[2]
    tensors = (x.detach().contiguous().split(1) for x in (q, k, v))
    masks = (
        [None] * B if x is None else x.expand(B, L).split(1) for x in (subtree_end, window_start)
    )
    rows = zip(*tensors, *masks, split_rows(tables, B), strict=True)
    return torch.cat([run(*row) for row in rows])


@constant_in_graphs
def chip_of(device: torch.device) -> Chip:
    """What `device`, an NVIDIA GPU, is."""
    properties: Any = torch.cuda.get_device_properties(device)
    return Chip((properties.major, properties.minor), properties.shared_memory_per_block_optin)


@contextmanager
def kept_graphs() -> Iterator[None]:
    """Where `retain_graph=True` works for what backend `flex` has computed, as for everything else.

    The backward pass of a compiled function refuses it, unless a setting of torch tells that no
    memory was given away (`flex` gives none away). Settings hold for a thread, so that the backward
    pass has to run in this one.
    """
    with (
        torch.autograd.set_multithreading_enabled(False),
        functorch_config.patch(donated_buffer=False),
    ):
        yield


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attend, dynamic=True, fullgraph=True)


def _attend_eagerly(*inputs: object) -> Tensor:
    """`_attend`, compiled: sizes are symbols, but scale and softcap are constants.

    Compiled functions by default let their backward pass overwrite what was kept for it. Not so
    here: eager callers may ask for gradients twice (`kept_graphs`). Nor are two sizes that happen
    to be equal in a first call one symbol: a row of as many blocks as heads would have a graph for
    this number of blocks alone.
    """
    with (
        torch._dynamo.config.patch(
            specialize_float=True, specialize_int=True, recompile_limit=MAX_COMPILES
        ),
        functorch_config.patch(donated_buffer=False),
        fx_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        return _compiled()(*inputs)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window_start: Tensor | None,
    tables: BlockTables,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    block: tuple[int, int],
    kernel_options: dict[str, Any],
) -> Tensor:
    """The region that is compiled."""
    B, H, L, _ = q.shape
    if L % BLOCK == 0:  # a graph of its own: full tiles of whole blocks load without a mask
        torch._check(L % BLOCK == 0)
    if kernel_options.get("BACKEND") == "FLASH":  # where two indices into memory are slow
        visible = flat_mask_mod(subtree_end, window_start)
    else:
        start = None if window_start is None else window_start.expand(B, L)
        visible = mask_mod(subtree_end.expand(B, L), start)
    block_mask = BlockMask(
        seq_lengths=(L, L),
        BLOCK_SIZE=block,
        mask_mod=visible,
        **tables._asdict(),
    )
    attend = partial(
        flex_attention,
        q,
        k,
        v,
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=k.shape[1] != H,
        kernel_options=kernel_options,
    )
    if sinks is None:
        return attend()
    out, aux = attend(return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, H, 1))
    return (out * share.unsqueeze(-1)).to(out.dtype)


def _soft_cap(bound: float) -> Callable[..., Tensor]:
    def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return bound * torch.tanh(score / bound)

    return soft_cap


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Raise UnsupportedModelError for what FlexAttention cannot do on this device."""
    if q.dtype == torch.float64:
        raise UnsupportedModelError(
            "backend 'flex' takes fp32, bf16 and fp16, got fp64; use backend='reference'"
        )
    if q.device.type != "cpu":
        narrow = min(q.shape[-1], v.shape[-1])
        if narrow < MIN_WIDTH:
            raise UnsupportedModelError(
                f"backend 'flex' needs heads at least {MIN_WIDTH} wide on CUDA, got {narrow}; "
                "use backend='reference'"
            )
        return
    tensors = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedModelError(
            "backend 'flex' has no backward pass on the CPU; use backend='cpu'"
        )
    if sinks is not None:
        raise UnsupportedModelError("backend 'flex' has no sinks on the CPU; use backend='cpu'")
