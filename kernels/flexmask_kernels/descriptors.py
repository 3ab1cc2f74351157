"""Tensors that a kernel walks tile by tile: as pointers or, from sm_90 on, as tensor descriptors.

With a descriptor the chip's TMA unit copies a tile to shared memory, addresses, bounds and all,
which takes no registers. Descriptors are made on the host, one launch by one, and are passed by
value: they need no memory of the device, and a CUDA graph can hold them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flexmask_kernels.configs import Config, block_width

_UNIT = 16  # bytes


def walked_tensors(config: Config, block: int, **tensors: Tensor) -> dict[str, Any]:
    """Kernel arguments for tensors [B, heads, L, width] that are read in tiles of `block` rows.

    They are descriptors if the configuration has TMA and all of them fit it, else what they were.
    """
    use_tma = config.use_tma and all(fits_tma(x) for x in tensors.values())
    if not use_tma:
        return {"USE_TMA": False, **tensors}
    return {"USE_TMA": True} | {
        name: TensorDescriptor(
            x, list(x.shape), list(x.stride()), [1, 1, block, block_width(x.shape[3])]
        )
        for name, x in tensors.items()
    }


def fits_tma(x: Tensor) -> bool:
    """Whether TMA can read x [.., width]: unit stride in a row, all else in units of 16 bytes."""
    *strides, last = x.stride()
    return (
        last == 1
        and x.data_ptr() % _UNIT == 0
        and all(stride > 0 and stride * x.element_size() % _UNIT == 0 for stride in strides)
    )
