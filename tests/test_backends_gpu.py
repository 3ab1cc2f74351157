"""The CUDA backends against the fp64 reference, outputs and all gradients."""

import pytest
import torch
from backend_cases import mask_from_depths, random_inputs, run, run_reference, stack
from torch._dynamo.utils import counters

from flexmask import PrefixTree, compile_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MASKS = {
    "conversation": compile_mask(PrefixTree.from_turns([(30, 220, 80)] * 3)),
    "caterpillar": mask_from_depths([d for depth in range(300) for d in (depth, depth + 1)]),
    "padded": mask_from_depths([*range(500), *[0] * 123]),
}
MASKS["batch"] = stack(list(MASKS.values()))

OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "window": {"window": 100},
    "sinks": {"sinks": torch.linspace(-1, 2, 8)},
}


def to_cuda(options):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", MASKS)
def test_flex_error_within_twice_low_precision_reference(name, option, dtype):
    mask, options = MASKS[name].to("cuda"), to_cuda(OPTIONS[option])
    inputs = random_inputs(mask, heads=8, width=64, value_width=64, dtype=dtype)
    inputs = [x.cuda() for x in inputs]
    exact = run_reference(mask, *inputs, **options)
    rough = run(mask, *inputs, backend="reference", **options)
    ours = run(mask, *inputs, backend="flex", **options)
    # tf32 is what FlexAttention multiplies fp32 with, unless told otherwise
    eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2**-10
    for result, theirs, reference in zip(ours, rough, exact, strict=True):
        assert torch.isfinite(result).all()
        bound = 2 * (theirs.double() - reference).abs().max() + 2 * eps * reference.abs().max()
        assert (result.double() - reference).abs().max() <= bound


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("width", [16, 128])
def test_flex_serves_grouped_heads_of_any_width(kv_heads, width):
    mask = MASKS["conversation"].to("cuda")
    shape = {"heads": 8, "kv_heads": kv_heads, "width": width, "value_width": width}
    inputs = [x.cuda() for x in random_inputs(mask, dtype=torch.bfloat16, **shape)]
    exact = run_reference(mask, *inputs)
    for result, reference in zip(run(mask, *inputs, backend="flex"), exact, strict=True):
        bound = 4 * torch.finfo(torch.bfloat16).eps * reference.abs().max()
        assert (result.double() - reference).abs().max() <= bound


def test_flex_serves_rows_of_any_length_and_does_not_compile_for_each():
    torch._dynamo.reset()
    counters.clear()
    for length in (2, 60, 127, 128, 129, 300, 1000):
        mask = mask_from_depths([*range(length - length // 3), *range(length // 3)]).to("cuda")
        inputs = random_inputs(mask, heads=8, width=64, value_width=64, dtype=torch.bfloat16)
        inputs = [x.cuda() for x in inputs]
        for result, reference in zip(
            run(mask, *inputs, backend="flex"), run_reference(mask, *inputs), strict=True
        ):
            bound = 4 * torch.finfo(torch.bfloat16).eps * reference.abs().max()
            assert (result.double() - reference).abs().max() <= bound, length
    # two rows' tables and one row's share a graph; a row below 128 tokens has a kernel of its own
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("option", ["chunk", "both"])
def test_flex_serves_chunks_and_sinks_with_windows_in_several_rows(option):
    options = {"chunk": {"chunk": 128}, "both": {"window": 100, "sinks": OPTIONS["sinks"]["sinks"]}}
    mask, options = MASKS["batch"].to("cuda"), to_cuda(options[option])
    inputs = random_inputs(mask, heads=8, width=64, value_width=64, dtype=torch.bfloat16)
    inputs = [x.cuda() for x in inputs]
    exact = run_reference(mask, *inputs, **options)
    for result, reference in zip(run(mask, *inputs, backend="flex", **options), exact, strict=True):
        bound = 4 * torch.finfo(torch.bfloat16).eps * reference.abs().max()
        assert (result.double() - reference).abs().max() <= bound
