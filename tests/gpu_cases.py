"""Masks, options and inputs of the tests that need a CUDA device."""

import torch
from backend_cases import mask_from_depths, random_inputs, run, run_reference, stack

from flexmask import PrefixTree, compile_mask

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
    "chunk": {"chunk": 128},
    "both": {"window": 200, "chunk": 256},
    "sinks": {"sinks": torch.linspace(-1, 2, 8)},
    "sinks, window": {"window": 100, "sinks": torch.linspace(-1, 2, 8)},
}


def options_on_gpu(name):
    options = OPTIONS[name].items()
    return {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options}


def inputs_on_gpu(mask, dtype=torch.bfloat16, width=64, value_width=None, kv_heads=2):
    shape = {"heads": 8, "kv_heads": kv_heads, "width": width, "value_width": value_width or width}
    return [x.cuda() for x in random_inputs(mask, dtype=dtype, **shape)]


def assert_errs_at_most_twice_as_much(backend, mask, inputs, *, eps=None, **options):
    """Out and all gradients, within twice the error of the reference in the same dtype."""
    eps = eps or torch.finfo(inputs[0].dtype).eps
    exact = run_reference(mask, *inputs, **options)
    rough = run(mask, *inputs, backend="reference", **options)
    ours = run(mask, *inputs, backend=backend, **options)
    for result, theirs, reference in zip(ours, rough, exact, strict=True):
        assert torch.isfinite(result).all()
        bound = 2 * (theirs.double() - reference).abs().max() + 2 * eps * reference.abs().max()
        assert (result.double() - reference).abs().max() <= bound
