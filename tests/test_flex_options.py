"""FlexAttention's kernel options: what is refused, and what a chip needs."""

import pytest
import torch
from backend_cases import mask_from_depths, random_inputs, windowed
from hypothesis import given
from mask_strategies import masks, windows
from model_cases import tiny_model

from flexmask import attention, patch
from flexmask.backends import flex, flex_options, flex_tables
from flexmask.backends.flex_options import Chip, complete, fitting_tiles, flash_block
from flexmask.errors import UnsupportedModelError
from flexmask.tree.intervals import dense_mask, flat_mask_mod

KIB = 1024
A100, RTX_4090, H100, B200, RTX_5090 = (
    Chip(divmod(sm, 10), KIB * memory)
    for sm, memory in ((80, 163), (89, 99), (90, 227), (100, 227), (120, 99))
)


def test_options_of_the_user_stand_before_those_that_the_mask_and_the_chip_need():
    assert complete(None, None, 256, 256, torch.bfloat16) == {"FORCE_USE_FLEX_ATTENTION": True}
    auto = {"BACKEND": "AUTO", "FORCE_USE_FLEX_ATTENTION": False}
    assert complete(auto, H100, 128, 128, torch.bfloat16) == {"FORCE_USE_FLEX_ATTENTION": False}
    flash = {"BACKEND": "FLASH"}
    assert complete(flash, H100, 128, 128, torch.bfloat16) == flash
    given = {"BACKEND": "TRITON", "BLOCK_M": 64, "bwd_num_stages": 2}
    options = complete(given, RTX_4090, 256, 256, torch.bfloat16)
    assert given.items() <= options.items()
    assert "fwd_BLOCK_M" not in options
    assert options["fwd_BLOCK_N"] == 64


def forward_bytes(chip, width, value_width, dtype):
    """What the tiles of a forward pass take, by the rule that the compiled ones bear out."""
    tiles = fitting_tiles(chip.shared_memory, width, value_width, dtype)
    padded = 1 << (max(width, value_width) - 1).bit_length()
    m, n = tiles["fwd_BLOCK_M"], tiles["fwd_BLOCK_N"]
    rows = m + 2 * (tiles["fwd_num_stages"] - 1) * n
    return rows * padded * dtype.itemsize


@pytest.mark.parametrize("chip", [RTX_4090, RTX_5090], ids=["sm_89", "sm_120"])
@pytest.mark.parametrize("width", [129, 160, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_wide_heads_get_tiles_that_fit_small_chips(chip, width, dtype):
    assert forward_bytes(chip, width, 128, dtype) < chip.shared_memory - 8 * KIB


def test_chips_with_memory_keep_the_tiles_of_inductor():
    for chip in (A100, RTX_4090, H100, B200):
        assert fitting_tiles(chip.shared_memory, 128, 128, torch.bfloat16) == {}
    for chip in (A100, H100, B200):
        assert fitting_tiles(chip.shared_memory, 256, 256, torch.bfloat16) == {}
    a100 = fitting_tiles(A100.shared_memory, 160, 160, torch.bfloat16)
    assert a100 == {"fwd_num_stages": 2}
    with pytest.raises(UnsupportedModelError, match="heads of 512 in float32 in 99 KiB of shared"):
        fitting_tiles(RTX_4090.shared_memory, 512, 512, torch.float32)


def test_blocks_are_those_that_flash_kernels_take():
    bf16 = torch.bfloat16
    assert flash_block(H100, 128, 128, bf16, has_sinks=False) == (128, 128)
    assert flash_block(B200, 64, 64, bf16, has_sinks=False) == (256, 128)
    assert flash_block(B200, 192, 128, bf16, has_sinks=False) == (256, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H100, 256, 256, torch.bfloat16), "takes heads of at most 128 .* got 256"),
        ((B200, 256, 256, torch.bfloat16), "takes heads of at most 128 .* got 256"),
        ((A100, 128, 128, torch.bfloat16), "on sm_90, sm_100 and sm_110, got sm_80"),
        ((None, 128, 128, torch.bfloat16), "got no NVIDIA GPU; leave BACKEND out"),
        ((H100, 128, 128, torch.float32), "takes bf16 and fp16, got torch.float32"),
    ],
)
def test_refuses_what_flash_kernels_do_not_take(arguments, message):
    with pytest.raises(UnsupportedModelError, match=message):
        flash_block(*arguments, has_sinks=False)


def test_sinks_on_flash_kernels_need_the_gradient_of_the_logsumexp(monkeypatch):
    monkeypatch.setattr(flex_options, "_HAS_LSE_GRADIENT", False)
    with pytest.raises(UnsupportedModelError, match=r"need torch 2\.14"):
        flash_block(H100, 128, 128, torch.bfloat16, has_sinks=True)
    monkeypatch.setattr(flex_options, "_HAS_LSE_GRADIENT", True)
    assert flash_block(H100, 128, 128, torch.bfloat16, has_sinks=True) == (128, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"BLOCKM": 64}, "FlexAttention has no 'BLOCKM'; it has num_warps, .* BACKEND"),
        ({"fwd_BLOCK_M": 48}, "fwd_BLOCK_M must be one of 16, 32, 64, 128, got 48"),
        ({"num_warps": True}, "num_warps must be a number from 1 to 64, got True"),
        ({"PRESCALE_QK": 1}, "PRESCALE_QK must be one of True, False, got 1"),
        ({"BACKEND": "TRITON_DECODE"}, "BACKEND must be one of AUTO, TRITON, FLASH, got"),
        ({"ROWS_GUARANTEED_SAFE": True}, "not true of packed trees"),
        ({"BACKEND": "FLASH"}, "needs the package flash-attn-4, which is not installed"),
        ([64], "must be a dict of FlexAttention's options"),
    ],
)
def test_refuses_options_by_name_and_value(options, message, monkeypatch):
    monkeypatch.setattr(flex_options, "has_flash", lambda: False)
    with pytest.raises(UnsupportedModelError, match=message):
        patch(tiny_model("qwen3"), backend="flex", kernel_options=options)


def test_refuses_options_for_other_backends():
    mask = mask_from_depths([0, 1, 1])
    q, k, v, _ = random_inputs(mask, dtype=torch.float32)
    for backend in ("auto", "cpu"):
        with pytest.raises(UnsupportedModelError, match=f"need backend='flex', got '{backend}'"):
            attention(q, k, v, mask, backend=backend, kernel_options={"BLOCK_M": 64})


def test_options_reach_flex_attention_from_a_patched_model(monkeypatch):
    seen = []

    def attend(*inputs):
        seen.append(inputs[-1])
        return inputs[0]

    monkeypatch.setattr(flex, "_attend_eagerly", attend)
    model = patch(tiny_model("qwen3"), backend="flex", kernel_options={"BLOCK_M": 64})
    ids = torch.arange(3)[None]
    with torch.no_grad():
        model(input_ids=ids, position_ids=ids, subtree_end=torch.tensor([[3, 3, 3]]))
    assert all(options["BLOCK_M"] == 64 for options in seen)
    assert seen


@given(mask=masks(), limits=windows())
def test_one_index_into_memory_gives_the_same_mask(mask, limits):
    end, start = mask.subtree_end, windowed(mask, **limits).window_start
    B, L = end.shape
    row, index = torch.arange(B), torch.arange(L)
    visible = flat_mask_mod(end, start)(row[:, None, None], row, index[:, None], index[None, :])
    assert torch.equal(visible.expand(B, L, L), dense_mask(end, start))


def test_captured_tables_do_not_wait_for_the_device(monkeypatch):
    end = mask_from_depths([*range(200), *range(100)]).subtree_end
    waiting = flex_tables.block_tables(end, None)
    monkeypatch.setattr(flex_tables, "is_capturing", lambda: True)
    monkeypatch.setattr(flex_tables, "tables_from_tiles", None)
    captured = flex_tables.block_tables(end, None)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(captured, name), getattr(waiting, name))
