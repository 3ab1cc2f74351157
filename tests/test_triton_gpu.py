"""The Triton kernels on a GPU: values, both modes of the backward pass, graphs."""

from functools import partial

import pytest
import torch
from backend_cases import (
    deterministic_algorithms,
    empty_is_nan,
    mask_from_depths,
    run,
    run_triton,
)
from gpu_cases import (
    CASES,
    HEADS,
    MASKS,
    NAMES,
    OPTIONS,
    SHORT,
    assert_errs_at_most_twice_as_much,
    inputs_on_gpu,
    needs_gpu,
    options_on_gpu,
)
from torch.utils.checkpoint import checkpoint

from flexmask.backends.api import dispatch

pytestmark = pytest.mark.gpu
modes = pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])


def check(mask, inputs, deterministic, **options):
    """Errors are at most twice those of the dense evaluation in the same dtype, plus rounding."""
    eps = torch.finfo(inputs[0].dtype).eps
    if inputs[0].dtype == torch.float32:  # sums in another order
        eps *= 8
    attend = partial(run_triton, deterministic=deterministic)
    assert_errs_at_most_twice_as_much(attend, mask, inputs, eps=eps, has_zeros=True, **options)


@modes
@pytest.mark.parametrize(("option", "dtype"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_error_within_twice_low_precision_reference(name, option, dtype, deterministic):
    mask = MASKS[name].to("cuda")
    check(mask, inputs_on_gpu(mask, dtype), deterministic, **options_on_gpu(option))


@modes
@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("widths", [(16, 16), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_serves_grouped_heads_of_any_width(widths, kv_heads, deterministic):
    mask = MASKS["conversation"].to("cuda")
    check(mask, inputs_on_gpu(mask, torch.bfloat16, *widths, kv_heads), deterministic)


@pytest.mark.parametrize("option", ["plain", "window", "chunk"])
def test_deterministic_gradients_are_bitwise_equal(option):
    mask = MASKS["batch"].to("cuda")
    inputs = inputs_on_gpu(mask)
    first, second = (
        run_triton(mask, *inputs, deterministic=True, **OPTIONS[option]) for _ in range(2)
    )
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@modes
@pytest.mark.parametrize("length", [1, 127, 128, 129, 638 if SHORT else 1000])
def test_serves_rows_of_any_length(length, deterministic):
    mask = mask_from_depths([*range(length - length // 3), *range(length // 3)]).to("cuda")
    check(mask, inputs_on_gpu(mask), deterministic)


@modes
@pytest.mark.parametrize("option", ["plain", "window", "chunk"])
def test_options_hold_for_unequal_widths_and_several_rows(option, deterministic):
    mask = MASKS["batch"].to("cuda")
    inputs = inputs_on_gpu(mask, width=96, value_width=72)
    check(mask, inputs, deterministic, **OPTIONS[option])


def test_strides_do_not_matter():
    mask = MASKS["batch"].to("cuda")
    inputs = inputs_on_gpu(mask)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    for x, y in zip(
        run_triton(mask, *odd, deterministic=True),
        run_triton(mask, *inputs, deterministic=True),
        strict=True,
    ):
        assert torch.equal(x, y)


@modes
def test_results_overwrite_memory_that_holds_nan(deterministic):
    mask = MASKS["batch"].to("cuda")
    with empty_is_nan():
        check(mask, inputs_on_gpu(mask), deterministic)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant):
    mask = MASKS["conversation"].to("cuda")
    *qkv, dout = inputs_on_gpu(mask)
    leaves = [x.detach().requires_grad_() for x in qkv]
    attend = partial(dispatch, subtree_end=mask.subtree_end, backend="triton")
    with deterministic_algorithms():
        out = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
        out.backward(dout)
    plain = run_triton(mask, *qkv, dout, deterministic=True)
    for x, y in zip((out, *(x.grad for x in leaves)), plain, strict=True):
        assert torch.equal(x, y)


@modes
def test_counters_equal_the_tiles_of_the_mask(deterministic):
    from flexmask_kernels.backward_pass import backward
    from flexmask_kernels.forward_pass import forward
    from flexmask_kernels.inputs import Counters, Inputs, Options
    from flexmask_kernels.tuning import choose_config

    mask = MASKS["batch"]
    q, k, v, dout = inputs_on_gpu(mask)
    counters = Counters(*torch.zeros(3, 2, dtype=torch.int32, device="cuda"))
    inputs = Inputs(q, k, v, mask.subtree_end.cuda())
    options = Options(0.1)
    out, lse2 = forward(inputs, options, counters=counters)
    backward(dout, inputs, out, lse2, options, deterministic=deterministic, counters=counters)
    kernels = {"forward": counters.forward}
    kernels["backward_keys" if deterministic else "backward_fused"] = counters.backward_keys
    if deterministic:
        kernels["backward_queries"] = counters.backward_queries
    for kernel, counted in kernels.items():
        config = choose_config(kernel, q, v)
        ranges = mask.tiles(config.block_q, config.block_k)
        full = HEADS * sum(row.num_full for row in ranges)
        assert counted.tolist() == [full, HEADS * sum(row.num_visited for row in ranges) - full]


@needs_gpu
def test_a_cuda_graph_replays_for_another_mask():
    masks = [MASKS["batch"].to("cuda"), mask_from_depths([*range(MASKS["batch"].shape[1])])]
    end = masks[0].subtree_end.clone()
    q, k, v, dout = inputs_on_gpu(masks[0])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step():
        out = dispatch(*leaves, end, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    end.copy_(masks[1].subtree_end)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_compiles_as_one_graph_with_gradients():
    mask = MASKS["conversation"].to("cuda")
    inputs = inputs_on_gpu(mask)

    def function(q, k, v, mask, *, sinks):
        return dispatch(q * 2, k, v, mask.subtree_end, sinks=sinks, backend="triton") * 3

    sinks = torch.linspace(-1, 1, HEADS, device="cuda")
    ours = run(mask, *inputs, sinks=sinks, function=torch.compile(function, fullgraph=True))
    for x, y in zip(ours, run(mask, *inputs, sinks=sinks, function=function), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@needs_gpu
def test_a_new_length_compiles_nothing():
    from flexmask_kernels.forward import forward_kernel

    def num_compiled():
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    sizes = []
    for length in (500, 512, 777, 1024):
        mask = mask_from_depths([*range(length)]).to("cuda")
        run_triton(mask, *inputs_on_gpu(mask))
        sizes.append(num_compiled())
    assert len(set(sizes)) == 1
