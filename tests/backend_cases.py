"""Random masks and tensors for attention backends, and the bounds on their errors."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from flexmask import TreeMask, attention
from flexmask.backends import calls
from flexmask.backends.cache import _cache as cache


def mask_from_depths(depths):
    """The mask of one row given the depth of each token in preorder; a depth of 0 opens a tree."""
    length = len(depths)
    end = np.full(length, length, np.int32)
    open_tokens: list[int] = []
    for token, depth in enumerate(depths):
        for closed in open_tokens[depth:]:
            end[closed] = token
        open_tokens[depth:] = [token]
    return TreeMask(end, np.asarray(depths, np.int32))


def stack(masks):
    """One mask of several rows, the shorter ones filled up with padding tokens."""
    length = max(mask.shape[1] for mask in masks)
    ends, positions = [], []
    for mask in masks:
        missing = torch.arange(mask.shape[1], length, dtype=torch.int32)
        ends.append(torch.cat([mask.subtree_end[0], missing + 1]))
        positions.append(torch.cat([mask.position_ids[0], torch.zeros_like(missing)]))
    return TreeMask(torch.stack(ends), torch.stack(positions))


def windowed(mask, window=None, chunk=None):
    """The same mask with a window, a chunk or both."""
    return replace(mask, window=window, chunk=chunk)


@contextmanager
def empty_is_nan():
    """Memory that is not written shows: `torch.empty` gives NaN, or an integer out of range."""
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(2**30)

    with mock.patch.object(torch, "empty", filled):
        yield


def run_triton(mask, *inputs, deterministic=False, **options):
    """`run` of the Triton kernels in either mode of their backward pass."""
    with deterministic_algorithms(deterministic):
        return run(mask, *inputs, backend="triton", **options)


@contextmanager
def deterministic_algorithms(is_on=True):
    """A block with torch's deterministic mode on or off; it is off behind it."""
    torch.use_deterministic_algorithms(is_on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_inputs(
    mask, *, heads=4, kv_heads=2, width=8, value_width=8, dtype=torch.float64, seed=0
):
    """q, k, v as models hold them, views of [B, L, H, D], and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    B, L = mask.shape

    def draw(num_heads, num_columns):
        x = torch.randn(B, L, num_heads, num_columns, generator=generator, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2)

    q, k, v = draw(heads, width), draw(kv_heads, width), draw(kv_heads, value_width)
    return q, k, v, draw(heads, value_width)


def run(mask, q, k, v, dout, *, sinks=None, function=attention, **options):
    """The output and the gradients of q, k, v and sinks."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        sinks = sinks.detach().requires_grad_()
        inputs.append(sinks)
    out = function(*inputs[:3], mask, sinks=sinks, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def run_reference(mask, q, k, v, dout, *, sinks=None, **options):
    """The same in fp64 on the dense backend."""
    tensors = [x.double() for x in (q, k, v, dout)]
    sinks = None if sinks is None else sinks.double()
    return run(mask, *tensors, sinks=sinks, backend="reference", **options)


def check_autocast(mask, backend, compiler=lambda function: function):
    """Under autocast, tensors of several dtypes give what those of its dtype give without it."""
    q, k, v, dout = random_inputs(mask, dtype=torch.float32)
    half = [x.half() for x in (q, k, v, dout)]

    @compiler
    def under_autocast(q, k, v, mask, *, sinks):
        with torch.autocast("cpu", torch.float16):
            return attention(q.half(), k, v, mask, backend=backend)

    ours = run(mask, q, k, v, half[3], function=under_autocast)
    assert [x.dtype for x in ours] == [torch.float16, *[torch.float32] * 3]
    for one, other in zip(ours, run(mask, *half, backend=backend), strict=True):
        assert torch.equal(one.half(), other)


def worst_ratio(results, references):
    """The largest error, in units of what rounding explains; above 1 something is wrong.

    A sum of n rounded terms errs by about eps sqrt(n) of its size. Scores have D terms, outputs L,
    gradients L or L + D of such outputs; 8 covers three sums after one another.
    """
    worst = 0.0
    for result, reference in zip(results, references, strict=True):
        assert torch.isfinite(result).all()
        eps = torch.finfo(result.dtype).eps
        size = reference.abs().max().clamp(min=1).item()
        bound = 8 * eps * (sum(results[0].shape[2:])) ** 0.5 * size
        worst = max(worst, (result.double() - reference).abs().max().item() / bound)
    return worst


def within_window(mask, *, window=None, chunk=None):
    """bool [B, L, L]: the visible pairs of `mask` whose positions are near enough."""
    visible, positions = mask.to_dense(), mask.position_ids
    query, key = positions[:, :, None], positions[:, None, :]
    if window is not None:
        visible = visible & (query - key < window)
    if chunk is not None:
        visible = visible & (query // chunk == key // chunk)
    return visible


@contextmanager
def tiny_calls():
    """Plans for the `cpu` backend as rows of thousands of tokens have them, at 40 tokens."""
    sizes = {
        "MAX_ROWS": 8,
        "_SQUARE_ROWS": 3,
        "_WINDOW_ROWS": 4,
        "_MANY_ROWS": 6,
        "_NEAR_KEYS": 4,
        "_CALL_PAIRS": 8,
        "_CALL_ROWS": 2,
    }
    cache.clear()
    with mock.patch.multiple(calls, **sizes):
        yield
    cache.clear()
