"""FlexAttention's kernels as users get them, compiled for the chip of the stand-in."""

import os

import pytest
import torch

from fake_cuda.gpu import CHIPS

if os.environ["TRITON_INTERPRET"] == "1":
    pytest.skip("needs TRITON_INTERPRET=0", allow_module_level=True)

from fake_cuda.compiled import flex_kernels

CAPABILITY = int(os.environ["FAKE_CUDA"])
_, MAX_SHARED = CHIPS[CAPABILITY]


def full_loops(kernels):
    """Instructions of the loops over full tiles, each behind that over partial ones."""
    return [sorted(loop.size for loop in kernel.loops[1::2]) for kernel in kernels]


def test_kernels_of_whole_blocks_fit_the_chip():
    for kernel in flex_kernels(256, 128):
        print(f"sm_{CAPABILITY}", kernel.registers, kernel.stack, kernel.shared, kernel.loops)
        assert kernel.shared <= MAX_SHARED


@pytest.mark.skipif(CAPABILITY != 90, reason="the same for all chips")
def test_full_tiles_of_whole_blocks_cost_what_they_do_in_a_kernel_for_one_length():
    users, alone = (full_loops(flex_kernels(256, 128, is_static=x)) for x in (False, True))
    for found, least in zip(users, alone, strict=True):
        for size, wanted in zip(found, least, strict=True):
            assert size <= wanted


@pytest.mark.skipif(MAX_SHARED > 128 * 1024, reason="a chip with more memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_wide_heads_fit_the_chip(dtype):
    for kernel in flex_kernels(256, 256, dtype=dtype):
        assert kernel.shared <= MAX_SHARED
