"""What a kernel has to do for a mask: tiles, products and bytes, counted without running it.

A tile that a kernel visits costs the same whether one of its pairs is visible or all are, so the
tiles are the cost; the visible pairs are the use. `KernelCost` holds both, and the traffic with the
device's memory if every tensor were read or written once.

The kernels count their tiles themselves when asked to (COUNT_TILES); a test holds them to this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from flexmask_kernels.configs import Config

from flexmask import TreeMask
from flexmask.backends.choice import Call, choose_backend
from flexmask.backends.varlen import plan_calls
from flexmask.backends.varlen_plan import gather_cost

# products of width D and of width D_v in each tile
_PRODUCTS = {
    "forward": (1, 1),  # q.k, P v
    "backward_queries": (2, 1),  # q.k and dq, dP
    "backward_keys": (2, 2),  # q.k and dk, dP and dv
    "backward_fused": (3, 2),  # the same and dq
}
_STATISTIC = 4  # bytes of an lse, a delta or an index


class Shape(NamedTuple):
    """Heads, widths and bytes of an element of q, k and v."""

    num_heads: int
    num_kv_heads: int
    width: int
    value_width: int
    element_size: int


USUAL = Shape(32, 8, 128, 128, 2)  # heads of an 8B model, in 16 bits


class KernelCost(NamedTuple):
    """What one launch does; tiles, products and bytes of all heads and rows together.

    Attributes:
        num_full: tiles visited without mask code.
        num_partial: tiles visited with it.
        num_flops: floating point operations on visible pairs.
        num_tile_flops: the same on all pairs of visited tiles, which is what runs.
        num_bytes: traffic if every tensor moves once.
    """

    num_full: int
    num_partial: int
    num_flops: int
    num_tile_flops: int
    num_bytes: int


def kernel_cost(
    kernel: str,
    mask: TreeMask,
    config: Config,
    shape: Shape,
) -> KernelCost:
    """The cost of `kernel`, one of `configs.KERNELS`, for all rows of the mask.

    Args:
        kernel: its name.
        mask: of B rows.
        config: its tile size.
        shape: of q, k and v.
    """
    block_q, block_k = config.block_q, config.block_k
    num_full = num_partial = 0
    for tiles in mask.tiles(block_q, block_k):
        num_full += tiles.num_full
        num_partial += tiles.num_visited - tiles.num_full
    heads, tiles_of_head = shape.num_heads, num_full + num_partial
    of_width, of_value_width = _PRODUCTS[kernel]
    flops = 2 * heads * (of_width * shape.width + of_value_width * shape.value_width)
    return KernelCost(
        num_full=heads * num_full,
        num_partial=heads * num_partial,
        num_flops=flops * mask.num_visible,
        num_tile_flops=flops * tiles_of_head * block_q * block_k,
        num_bytes=mask.shape[0] * mask.shape[1] * _bytes_of_token(kernel, shape),
    )


def varlen_cost(mask: TreeMask, shape: Shape) -> dict[str, Any]:
    """What the `varlen` backend calls and gathers for a mask, in 16 bits, and what "auto" takes."""
    q, k = (
        torch.empty(1, heads, 1, shape.width, dtype=torch.bfloat16)
        for heads in (shape.num_heads, shape.num_kv_heads)
    )
    cost = gather_cost(mask.subtree_end)
    end = mask.subtree_end
    return {
        **cost._asdict(),
        "num_calls": [len(plan_calls(end, q, k, is_backward=b)) for b in (False, True)],
        "num_bytes": cost.keys * shape.num_kv_heads * _row_bytes(shape),
        "auto": choose_backend("cuda", call=Call(subtree_end=end)).name,
    }


def _bytes_of_token(kernel: str, shape: Shape) -> int:
    """Bytes of one token if each tensor moves once; planning is not counted, it is small."""
    row_bytes, heads = _row_bytes(shape), shape.num_heads
    keys = shape.num_kv_heads * row_bytes  # k and v, or dk and dv
    if kernel == "forward":
        token = heads * (row_bytes + _STATISTIC) + keys
    elif kernel == "backward_queries":
        token = heads * (row_bytes + shape.width * shape.element_size + 2 * _STATISTIC) + keys
    else:
        token = heads * (row_bytes + 2 * _STATISTIC) + 2 * keys
        if kernel == "backward_fused":
            token += heads * 4 * shape.width
    return token + _STATISTIC


def _row_bytes(shape: Shape) -> int:
    """Bytes of a key and its value, of a query and its output, or of both gradients, of a head."""
    return (shape.width + shape.value_width) * shape.element_size
