"""The `flex` backend on CUDA against the fp64 reference, outputs and all gradients."""

from functools import partial

import pytest
import torch
from backend_cases import mask_from_depths, run, run_reference, stack
from gpu_cases import (
    CASES,
    MASKS,
    NAMES,
    SHORT,
    assert_errs_at_most_twice_as_much,
    inputs_on_gpu,
    options_on_gpu,
)
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

pytestmark = pytest.mark.gpu


def assert_near_reference(mask, inputs, **options):
    exact = run_reference(mask, *inputs)
    largest = max(reference.abs().max() for reference in exact)
    for result, reference in zip(run(mask, *inputs, backend="flex", **options), exact, strict=True):
        size = reference.abs().max() or largest  # a lone token's queries and keys have no gradient
        bound = 4 * torch.finfo(torch.bfloat16).eps * size
        assert (result.double() - reference).abs().max() <= bound


@pytest.mark.parametrize(("option", "dtype"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_flex_error_within_twice_low_precision_reference(name, option, dtype):
    mask, options = MASKS[name].to("cuda"), options_on_gpu(option)
    # tf32 is what FlexAttention multiplies fp32 with, unless told otherwise
    eps = 2**-10 if dtype == torch.float32 else None
    inputs = inputs_on_gpu(mask, dtype)
    attend = partial(run, backend="flex")
    assert_errs_at_most_twice_as_much(attend, mask, inputs, eps=eps, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1), (8, 8)])
def test_flex_serves_grouped_heads(heads, kv_heads):
    mask = MASKS["conversation"].to("cuda")
    assert_near_reference(mask, inputs_on_gpu(mask, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("widths", [(16, 16), (48, 80), (96, 96), (128, 128), (256, 256)])
def test_flex_serves_heads_of_any_width(widths):
    mask = MASKS["conversation"].to("cuda")
    assert_near_reference(mask, inputs_on_gpu(mask, torch.bfloat16, *widths))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("names", [["causal"], ["causal", "two chains"]])
def test_block_masks_serve_flex_attention(names, dynamic):
    rows = {"causal": range(512), "two chains": [*range(300), *range(212)]}
    mask = stack([mask_from_depths([*rows[name]]) for name in names]).to("cuda")
    blocks = mask.to_block_mask(128)

    @torch.compile(dynamic=dynamic)
    def attend(q, k, v, mask, **options):
        return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)

    inputs = inputs_on_gpu(mask)
    exact = run_reference(mask, *inputs)
    for result, reference in zip(run(mask, *inputs, function=attend), exact, strict=True):
        bound = 4 * torch.finfo(torch.bfloat16).eps * reference.abs().max()
        assert (result.double() - reference).abs().max() <= bound


def test_flex_takes_kernel_options():
    mask = MASKS["conversation"].to("cuda")
    options = {"BLOCK_M": 64, "fwd_num_stages": 1, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N2": 32}
    assert_near_reference(mask, inputs_on_gpu(mask), kernel_options=options)


def test_flex_serves_rows_of_any_length_and_does_not_compile_for_each():
    torch._dynamo.reset()
    counters.clear()
    for length in (1, 2, 60, 127, 128, 129, 256, 300, 384, 638 if SHORT else 1000):
        mask = mask_from_depths([*range(length - length // 3), *range(length // 3)]).to("cuda")
        assert_near_reference(mask, inputs_on_gpu(mask))
    # one token, less than a block, one block, whole blocks, any other length
    assert counters["stats"]["unique_graphs"] <= 5
