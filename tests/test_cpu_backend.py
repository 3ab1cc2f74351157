"""The `cpu` backend against the fp64 reference, its plan, its memory and its operators."""

import math
from contextlib import nullcontext

import pytest
import torch
from backend_cases import (
    mask_from_depths,
    random_inputs,
    run,
    run_reference,
    stack,
    tiny_calls,
    windowed,
    within_window,
    worst_ratio,
)
from hypothesis import example, given
from hypothesis import strategies as st
from mask_strategies import masks, windows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexmask import PrefixTree, TreeMask, attention, compile_mask
from flexmask.backends import cpu
from flexmask.backends.api import dispatch
from flexmask.backends.calls import MAX_ROWS, Pairs, plan_rows

PADDING = mask_from_depths([0] * 9)
CATERPILLAR = mask_from_depths([d for depth in range(20) for d in (depth, depth + 1)])


@given(mask=masks(max_rows=1, max_tokens=60), limits=windows(), is_tiny=st.booleans())
@example(mask=PADDING, limits={}, is_tiny=True)
@example(mask=CATERPILLAR, limits={"window": 4}, is_tiny=True)
@example(mask=CATERPILLAR, limits={"chunk": 6}, is_tiny=True)
def test_calls_cover_each_visible_pair_once(mask, limits, is_tiny):
    with tiny_calls() if is_tiny else nullcontext():
        (plan,) = plan_rows(mask.subtree_end, windowed(mask, **limits).window_start)
    visible = within_window(mask, **limits)[0]
    counts = torch.zeros(visible.shape, dtype=torch.int64)
    met = torch.zeros(visible.shape[0], dtype=torch.bool)
    for call in plan:
        rows = torch.arange(call.start, call.stop)
        keys = torch.arange(visible.shape[0])[call.keys]
        pairs = {
            Pairs.ALL: torch.ones(rows.numel(), keys.numel(), dtype=torch.bool),
            Pairs.CAUSAL: keys[None, :] <= rows[:, None],
            Pairs.SELF: keys[None, :] == rows[:, None],
            Pairs.MASKED: visible[rows][:, keys],
        }[call.pairs]
        counts[rows[:, None], keys[None, :]] += pairs
        assert torch.equal(met[rows], torch.full_like(met[rows], not call.is_first))
        met[rows] = True
    assert torch.equal(counts, visible.long())


@given(
    mask=masks(),
    limits=windows(),
    is_tiny=st.booleans(),
    has_sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 1.5]),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_width=st.sampled_from([4, 8, 12]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_equal_reference(
    mask, limits, is_tiny, has_sinks, softcap, kv_heads, value_width, dtype, seed
):
    inputs = random_inputs(mask, kv_heads=kv_heads, value_width=value_width, dtype=dtype, seed=seed)
    sinks = torch.linspace(-1, 2, 4, dtype=dtype) if has_sinks else None
    options = {"sinks": sinks, "softcap": softcap, **limits}
    with tiny_calls() if is_tiny else nullcontext():
        ours = run(mask, *inputs, backend="cpu", **options)
    assert worst_ratio(ours, run_reference(mask, *inputs, **options)) < 1


LONG = {
    "conversation": compile_mask(PrefixTree.from_turns([(30, 220, 80)] * 3)),
    "caterpillar": mask_from_depths([d for depth in range(700) for d in (depth, depth + 1)]),
    "leaves": mask_from_depths([*range(600), *[300] * 700]),
    "forest": mask_from_depths([d for tree in range(60) for d in (*range(20), *range(10, 15))]),
    "padded": mask_from_depths([*range(900), *[0] * 700]),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 100}, {"chunk": 150}, {"softcap": 2.0}, {"softcap": 2.0, "window": 100}],
    ids=["all", "window", "chunk", "softcap", "softcap-window"],
)
def test_long_rows_equal_reference(name, options):
    inputs = random_inputs(LONG[name], heads=2, kv_heads=1, dtype=torch.float32)
    ours = run(LONG[name], *inputs, backend="cpu", **options)
    assert worst_ratio(ours, run_reference(LONG[name], *inputs, **options)) < 1


def eager_attention(q, k, v, mask, *, sinks=None, softcap=None):
    """What a user would write: every step in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.to_dense().unsqueeze(1), -math.inf)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, 2.0)],
    ids=["bf16", "fp16", "bf16-softcap"],
)
@pytest.mark.parametrize("name", LONG)
def test_error_within_twice_eager_error(name, softcap, dtype):
    mask = LONG[name]
    inputs = random_inputs(mask, heads=2, kv_heads=1, dtype=dtype)
    ours = run(mask, *inputs, backend="cpu", softcap=softcap)
    eager = run(mask, *inputs, function=eager_attention, softcap=softcap)
    references = run_reference(mask, *inputs, softcap=softcap)
    for result, theirs, reference in zip(ours, eager, references, strict=True):
        rounding = torch.finfo(dtype).eps * reference.abs().max()
        bound = 2 * (theirs.double() - reference).abs().max() + rounding
        assert (result.double() - reference).abs().max() <= bound


def test_a_wrong_mask_is_noticed():
    mask = LONG["conversation"]
    wrong = mask.subtree_end.clone()
    wrong[0, 3] -= 1  # one pair less
    inputs = random_inputs(mask)
    ours = run(TreeMask([*range(1, mask.shape[1] + 1)]), *inputs, backend="cpu")
    assert worst_ratio(ours, run_reference(mask, *inputs)) > 1000
    out = dispatch(*inputs[:3], wrong, backend="cpu")
    assert worst_ratio([out], [attention(*inputs[:3], mask, backend="reference")]) > 1000


def test_two_runs_are_bitwise_equal():
    mask = stack([LONG["conversation"], LONG["forest"]])
    inputs = random_inputs(mask, dtype=torch.float32)
    for first, second in zip(
        run(mask, *inputs, backend="cpu"), run(mask, *inputs, backend="cpu"), strict=True
    ):
        assert torch.equal(first, second)


def test_strides_do_not_matter():
    mask = LONG["forest"]
    q, k, v, dout = random_inputs(mask, dtype=torch.float32)
    plain = run(mask, q.contiguous(), k.contiguous(), v.contiguous(), dout, backend="cpu")
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v, dout)]
    odd[1] = torch.stack([k, k], -1)[..., 0]
    references = run_reference(mask, q, k, v, dout)
    assert worst_ratio(plain, references) < 1
    assert worst_ratio(run(mask, *odd, backend="cpu"), references) < 1


def test_scale_is_used():
    mask = LONG["padded"]
    inputs = random_inputs(mask)
    references = run_reference(mask, *inputs, scale=0.7)
    assert worst_ratio(run(mask, *inputs, scale=0.7, backend="cpu"), references) < 1


def test_one_row_of_mask_serves_a_batch():
    mask = mask_from_depths([0, 1, 2, 1, 2, 0, 0])
    inputs = random_inputs(stack([mask, mask]))
    ours = run(mask, *inputs, backend="cpu")
    assert worst_ratio(ours, run_reference(stack([mask, mask]), *inputs)) < 1


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.num_elements = max(self.num_elements, stored)
        return result


DEEP = {
    "comb": lambda n: [*range(n // 2), *reversed(range(1, n // 2 + 1))],
    "caterpillar": lambda n: [d for depth in range(n // 2) for d in (depth, depth + 1)],
    "star": lambda n: [0, *[1] * (n - 1)],
    "padding": lambda n: [*range(n // 2), *[0] * (n // 2)],
    "chain": lambda n: [*range(n)],
}


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (300, None), (None, 2.0)], ids=["all", "window", "capped"]
)
@pytest.mark.parametrize("shape", DEEP)
def test_no_tensor_grows_with_the_square_of_the_row(shape, window, softcap):
    length, width = 8000, 4
    mask = mask_from_depths(DEEP[shape](length))
    q, k, v, dout = random_inputs(mask, heads=2, kv_heads=1, width=width, value_width=width)
    arguments = (mask.subtree_end, windowed(mask, window).window_start, None)
    with LargestTensor() as largest:  # inside the operators, which hide their steps otherwise
        out, lse = cpu._forward._init_fn(q, k, v, *arguments, 0.5, softcap)
        cpu._backward._init_fn(dout, q, k, v, *arguments, out, lse, 0.5, softcap)
    assert largest.num_elements <= max(2 * width * length, 4 * MAX_ROWS * MAX_ROWS)


def test_plan_of_many_branches_has_few_calls():
    (calls,) = plan_rows(mask_from_depths(DEEP["comb"](8000)).subtree_end)
    assert len(calls) < 8000 / 64
    assert len(plan_rows(PADDING.subtree_end)[0]) == 1


def test_compiles_as_one_graph_with_gradients():
    mask = LONG["forest"]
    inputs = random_inputs(mask, dtype=torch.float32)

    def function(q, k, v, mask, *, sinks):
        return dispatch(q * 2, k, v, mask.subtree_end, sinks=sinks, backend="cpu") * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    sinks = torch.linspace(-1, 1, 4)
    ours = run(mask, *inputs, sinks=sinks, function=compiled)
    eager = run(mask, *inputs, sinks=sinks, function=function)
    for x, y in zip(ours, eager, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 2.0)],
    ids=["fp32", "bf16", "capped"],
)
def test_operators_keep_their_promises(dtype, softcap):
    mask = stack([mask_from_depths([0, 1, 2, 1, 2, 0, 0]), mask_from_depths([0, 1, 1])])
    q, k, v, dout = random_inputs(mask, dtype=dtype)
    sinks = torch.zeros(4, dtype=dtype, requires_grad=True)
    arguments = (mask.subtree_end, windowed(mask, window=3).window_start, sinks)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(cpu._forward, (*leaves, *arguments, 0.5, softcap))
    with torch.no_grad():
        out, lse = cpu._forward(*leaves, *arguments, 0.5, softcap)
        torch.library.opcheck(cpu._backward, (dout, *leaves, *arguments, out, lse, 0.5, softcap))
