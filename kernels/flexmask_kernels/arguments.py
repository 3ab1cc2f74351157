"""What the three attention kernels have in common: their work, their grid, most arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexmask_kernels.configs import BY_KEY, Config, block_width
from flexmask_kernels.inputs import Inputs, Options
from flexmask_kernels.planning import Plan, plan_lines
from flexmask_kernels.tuning import choose_config

LOG2E = math.log2(math.e)


def plan_kernel(kernel: str, inputs: Inputs, options: Options) -> Plan:
    """What the programs of `kernel` visit, with the tile sizes of `config_of`."""
    masks = (inputs.end,) if inputs.start is None else (inputs.end, inputs.start)
    return plan_lines(*masks, config=config_of(kernel, inputs, options), by_key=kernel in BY_KEY)


def config_of(kernel: str, inputs: Inputs, options: Options) -> Config:
    """The configuration to launch `kernel` with."""
    is_plain = options.softcap is None and inputs.start is None
    return choose_config(kernel, inputs.q, inputs.v, is_plain=is_plain)


def common_arguments(
    inputs: Inputs, options: Options, config: Config, plan: Plan, counter: Tensor | None
) -> dict[str, Any]:
    """The arguments that all three attention kernels take, apart from tensors of tokens."""
    q, k, v = inputs.q, inputs.k, inputs.v
    width, value_width = q.shape[3], v.shape[3]
    softcap = options.softcap
    return {
        "end_ptr": inputs.end,
        "start_ptr": inputs.start,
        "plan_ptr": plan.lines,
        "tiles_ptr": plan.tiles if plan.tiles.numel() else None,
        "order_ptr": plan.order,
        "counter_ptr": counter,
        **strides(q=q, k=k, v=v),
        "L": q.shape[2],
        "H": q.shape[1],
        "H_KV": k.shape[1],
        "num_lines": plan.lines.shape[1],
        "capacity": plan.tiles.shape[2],
        "num_rows": inputs.end.shape[0],
        "before_tanh": options.scale / (softcap or 1.0),
        "to_log2": (softcap or options.scale) * LOG2E,
        "D": width,
        "D_V": value_width,
        "BLOCK_D": block_width(width),
        "BLOCK_D_V": block_width(value_width),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": inputs.start is not None,
        "PRECISION": input_precision(q.dtype, q.device.type),
        "COUNT_TILES": counter is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # scores * to_log2 - lse2 is one instruction
    }


def input_precision(dtype: torch.dtype, device_type: str) -> str:
    """What `tl.dot` makes of its inputs: "tf32" for fp32 on CUDA where torch's own products do.

    `fp32_precision` follows both of torch's interfaces, `allow_tf32` raises once the newer one was
    used. Other dtypes never ask.
    """
    if dtype != torch.float32 or device_type != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def strides(*, constant: bool = True, **tensors: Tensor) -> dict[str, int]:
    """The strides of tensors [B, heads, L, width], by their short names in the kernels.

    From row to row it is a compile-time constant of what a kernel reads (`primitives.load_rows`),
    in capitals, and none of what it writes.
    """
    found: dict[str, int] = {}
    for name, x in tensors.items():
        batch, head, row, _ = x.stride()
        to_row = f"STRIDE_{name.upper()}" if constant else f"stride_{name}"
        found |= {f"stride_{name}b": batch, f"stride_{name}h": head, to_row: row}
    return found


def head_grid(k: Tensor) -> tuple[int, int]:
    """The second and third axis of every attention kernel's grid: key heads, rows."""
    return k.shape[1], k.shape[0]
