"""Masks, options and inputs of the tests that need a CUDA device."""

import os

import pytest
import torch
from backend_cases import mask_from_depths, random_inputs, run, run_reference, stack
from model_cases import gradients

from flexmask import PrefixTree, compile_mask

# in Triton's interpreter, on the stand-in of fake_cuda, a long row would take minutes
SHORT = os.environ.get("TRITON_INTERPRET") == "1"
HEADS = 2 if SHORT else 8
MASKS = {
    "conversation": compile_mask(
        PrefixTree.from_turns([(15, 60, 20)] * 2 if SHORT else [(30, 220, 80)] * 3)
    ),
    "caterpillar": mask_from_depths(
        [d for depth in range(70 if SHORT else 300) for d in (depth, depth + 1)]
    ),
    "padded": mask_from_depths([*range(150), *[0] * 40] if SHORT else [*range(500), *[0] * 123]),
}
MASKS["batch"] = stack(list(MASKS.values()))
NAMES = ["batch"] if SHORT else list(MASKS)
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "window": {"window": 100},
    "chunk": {"chunk": 128},
    "both": {"window": 200, "chunk": 256},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
    "sinks, window": {"window": 100, "sinks": torch.linspace(-1, 2, HEADS)},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [
    pytest.param(option, dtype, id=f"{option}-{str(dtype).removeprefix('torch.')}")
    for option in OPTIONS
    for dtype in DTYPES
    if not SHORT or dtype == torch.bfloat16 or option == "sinks, window"
]
needs_gpu = pytest.mark.skipif(SHORT, reason="needs compiled kernels and streams")


def step(model, batches, count):
    """The mean loss of a step on the GPU, and the gradients of all parameters."""
    model.zero_grad()
    moved = ({name: x.to("cuda") for name, x in batch.items()} for batch in batches)
    losses = [model(**batch, num_items_in_batch=count).loss for batch in moved]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses), gradients(model)


def options_on_gpu(name):
    options = OPTIONS[name].items()
    return {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options}


def inputs_on_gpu(
    mask, dtype=torch.bfloat16, width=64, value_width=None, kv_heads=None, heads=HEADS
):
    shape = {"heads": heads, "kv_heads": kv_heads or -(-heads // 4)}
    widths = {"width": width, "value_width": value_width or width}
    return [x.cuda() for x in random_inputs(mask, dtype=dtype, **shape, **widths)]


def assert_errs_at_most_twice_as_much(
    attend, mask, inputs, *, eps=None, has_zeros=False, **options
):
    """Out and all gradients, within twice the error of the reference in the same dtype.

    Args:
        attend: `run` of a backend, or what is called like it.
        mask: on the GPU, as are the next.
        inputs: q, k, v and the gradient of the output.
        eps: of rounding; that of the dtype if None.
        has_zeros: a lone token's queries and keys have no gradient, and are rounded like the rest.
        **options: of attention.
    """
    eps = eps or torch.finfo(inputs[0].dtype).eps
    exact = run_reference(mask, *inputs, **options)
    rough = run(mask, *inputs, backend="reference", **options)
    ours = attend(mask, *inputs, **options)
    largest = max(reference.abs().max() for reference in exact)
    for result, theirs, reference in zip(ours, rough, exact, strict=True):
        assert torch.isfinite(result).all()
        size = reference.abs().max() or (largest if has_zeros else 0)
        bound = 2 * (theirs.double() - reference).abs().max() + 2 * eps * size
        assert (result.double() - reference).abs().max() <= bound
