"""The `varlen` backend on FlashAttention's kernels: values, both modes, graphs, whole models."""

import copy
from functools import partial

import pytest
import torch
from backend_cases import deterministic_algorithms, run
from gpu_cases import (
    HEADS,
    MASKS,
    NAMES,
    OPTIONS,
    assert_errs_at_most_twice_as_much,
    inputs_on_gpu,
    needs_gpu,
    options_on_gpu,
    step,
)
from model_cases import tiny_model
from sample_cases import random_samples

from flexmask import attention, build_tree, pack, patch
from flexmask.backends.choice import record_choices
from flexmask.model.npass import npass_batches

pytestmark = pytest.mark.gpu
run_varlen = partial(run, backend="varlen")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "softcap"])
@pytest.mark.parametrize("name", NAMES)
def test_error_within_twice_low_precision_reference(name, option, dtype):
    mask = MASKS[name].to("cuda")
    inputs = inputs_on_gpu(mask, dtype)
    assert_errs_at_most_twice_as_much(run_varlen, mask, inputs, **options_on_gpu(option))


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize(
    ("width", "value_width"), [(8, 8), (40, 40), (96, 64), (128, 128), (192, 128), (200, 200)]
)
def test_heads_of_any_width(width, value_width, kv_heads):
    mask = MASKS["batch"].to("cuda")
    inputs = inputs_on_gpu(mask, width=width, value_width=value_width, kv_heads=kv_heads)
    assert_errs_at_most_twice_as_much(run_varlen, mask, inputs, window=100)


def test_the_deterministic_mode_gives_the_same_bits():
    mask = MASKS["batch"].to("cuda")
    inputs = inputs_on_gpu(mask)
    with deterministic_algorithms():
        first, second = (run_varlen(mask, *inputs) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=needs_gpu)])
def test_compiles_in_the_callers_graph(mode):
    mask = MASKS["conversation"].to("cuda")
    *inputs, dout = inputs_on_gpu(mask)

    def function(q, k, v):
        return attention(q * 2, k, v, mask, backend="varlen") * 4  # exact, also where it is fused

    leaves = [x.detach().requires_grad_() for x in inputs]
    expected = function(*leaves)
    wanted = torch.autograd.grad(expected, leaves, dout)
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(3):  # a CUDA graph is recorded in the second call
        found = compiled(*leaves)
        grads = torch.autograd.grad(found, leaves, dout)
        for x, y in zip((found, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4_text"])
def test_a_bf16_model_errs_at_most_twice_as_much_as_separate_sequences(family):
    samples = random_samples(0, num_samples=4, stem=60, tail=50)
    model = tiny_model(family, max_position_embeddings=512, head_dim=16).to("cuda")
    (row,) = pack([build_tree(samples)])
    count = sum(int((sample.loss_weights > 0).sum()) for sample in samples)

    _, exact = step(copy.deepcopy(model), npass_batches(samples), count)
    _, rough = step(copy.deepcopy(model).bfloat16(), npass_batches(samples), count)
    with record_choices() as choices:
        _, ours = step(patch(model.bfloat16(), backend="varlen"), [row.to_batch()], count)
    assert {choice.name for choice in choices} == {"varlen"}
    eps = torch.finfo(torch.bfloat16).eps
    for name, reference in exact.items():
        bound = 2 * (rough[name].float() - reference).norm() + 2 * eps * reference.norm()
        assert (ours[name].float() - reference).norm() <= bound, name
