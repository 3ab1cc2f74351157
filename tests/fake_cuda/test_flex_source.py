"""What inductor writes for backend `flex`: kernels for whole blocks, calls of FlashAttention-4."""

import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from backend_cases import mask_from_depths, run, stack
from gpu_cases import inputs_on_gpu
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.kernel.flex import flex_flash_attention

from flexmask.backends import flex, flex_options

ROW = mask_from_depths([*range(200), *range(50, 106)])  # two blocks


class NoTensors(NamedTuple):
    """The fields of flash-attn-4 that torch looks for; none of them."""


@pytest.fixture
def sources(monkeypatch):
    """What inductor hands to its compilers, by the name of the compiler's method."""
    torch._dynamo.reset()
    kept = {"triton": set(), "cutedsl": set()}  # some are compiled ahead, too
    compile_triton = AsyncCompile.triton

    def triton(self, name, source, *arguments, **options):
        kept["triton"].add(source)
        return compile_triton(self, name, source, *arguments, **options)

    def cutedsl(self, name, source):
        kept["cutedsl"].add(source)
        return SimpleNamespace(run=lambda *tensors, **options: None)

    monkeypatch.setattr(AsyncCompile, "triton", triton)
    monkeypatch.setattr(AsyncCompile, "cutedsl", cutedsl)
    return kept


@pytest.fixture
def absent_flash_attention(monkeypatch):
    """flash-attn-4 as far as torch looks at it before a kernel runs."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity"):
        module = ModuleType(name)
        module.__path__, module.__spec__ = [], ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.BlockSparseTensorsTorch = NoTensors
    monkeypatch.setattr(flex_flash_attention, "ensure_flash_available", lambda: True)


@pytest.mark.parametrize("length", [256, 300])
def test_kernels_check_lengths_unless_rows_are_whole_blocks(length, sources):
    mask = mask_from_depths([*range(length)]).to("cuda")
    run(mask, *inputs_on_gpu(mask, width=16), backend="flex")
    templates = [source for source in sources["triton"] if "IS_DIVISIBLE" in source]
    assert len(templates) >= 2  # forward and backward
    for source in templates:
        found = set(re.findall(r"IS_DIVISIBLE : tl.constexpr = (\w+)", source))
        assert found == {str(length == 256)}


@pytest.mark.parametrize(
    ("masks", "options"),
    [([ROW], {}), ([ROW, ROW], {}), ([ROW], {"window": 40}), ([ROW], {"softcap": 2.0})],
    ids=["one row", "two rows", "window", "softcap"],
)
def test_flash_kernels_get_their_blocks_and_one_index_into_memory(
    masks, options, sources, absent_flash_attention
):
    mask = stack(masks).to("cuda")
    inputs = inputs_on_gpu(mask, torch.float16)
    kernel_options = {"BACKEND": "FLASH"}
    run(mask, *inputs, backend="flex", kernel_options=kernel_options, **options)
    chip = flex.chip_of(inputs[0].device)
    block = flex_options.flash_block(chip, 64, 64, torch.float16, has_sinks=False)
    assert len(sources["cutedsl"]) == 2
    for source in sources["cutedsl"]:
        assert re.search(rf"""block_size["=: ]+\({block[0]}, {block[1]}\)""", source)
        loads = re.findall(r"= \((in_ptr\d+\[.*\])\)", source)
        assert loads
        assert not any("], " in load for load in loads)
