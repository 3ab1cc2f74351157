"""The `varlen` backend over a plain stand-in for FlashAttention, and its calls of torch's own."""

from unittest import mock

import numpy as np
import pytest
import torch
from backend_cases import (
    empty_is_nan,
    mask_from_depths,
    random_inputs,
    run,
    run_reference,
    stack,
    within_window,
    worst_ratio,
)
from hypothesis import example, given
from hypothesis import strategies as st
from mask_strategies import masks, windows

from flexmask import PrefixTree, attention, compile_mask
from flexmask.backends import varlen
from flexmask.backends.api import dispatch
from flexmask.backends.varlen_plan import Group, gather_cost, plan_groups
from flexmask.errors import UnsupportedModelError

PADDING = mask_from_depths([0] * 40)
CATERPILLAR = mask_from_depths([d for depth in range(20) for d in (depth, depth + 1)])
CONVERSATION = compile_mask(PrefixTree.from_turns([(3, 22, 8)] * 3))
PADDED = stack([CONVERSATION, PADDING, mask_from_depths([*range(9), *[0] * 20, *range(5)])])


def planned(mask, **options):
    defaults = {"window": None, "chunk": None, "key_bytes": 1, "sequence_bytes": 0}
    return plan_groups(mask.subtree_end, **defaults | {"budget": 2**30} | options)


@given(mask=masks(max_tokens=60), limits=windows(), budget=st.sampled_from([1, 40, 10**9]))
@example(mask=PADDED, limits={}, budget=10**9)
@example(mask=PADDED, limits={"window": 4}, budget=40)
@example(mask=PADDED, limits={"chunk": 6}, budget=40)
def test_groups_cover_each_visible_pair_once(mask, limits, budget):
    limits = {"window": None, "chunk": None, **limits}
    groups = planned(mask, **limits, sequence_bytes=2, budget=budget)
    B, L = mask.shape
    counts = torch.zeros(B * L, B * L, dtype=torch.int64)
    place = np.arange(B * L)
    for group in groups:
        rows, keys = (place[x if isinstance(x, slice) else x.numpy()] for x in group[:2])
        edges = [x.tolist() for x in group[2:4]]
        cost = edges[1][-1] + 2 * (len(edges[1]) - 1)
        assert cost <= budget or len(edges[1]) == 2
        for q_start, q_stop, k_start, k_stop in zip(
            *(x[i:] for x in edges for i in (0, 1)), strict=False
        ):
            assert q_stop - q_start <= group.max_q
            assert k_stop - k_start <= group.max_k
            for number, query in enumerate(rows[q_start:q_stop]):
                last = k_stop - (q_stop - q_start) + number
                left = last - k_start if group.window_left < 0 else group.window_left
                counts[query, keys[max(k_start, last - left) : last + 1]] += 1
    visible = torch.block_diag(*within_window(mask, **limits).long())
    assert torch.equal(counts, visible)
    cost = gather_cost(mask.subtree_end, **limits)
    assert cost.tokens == B * L
    assert cost.pairs == visible.sum()
    assert cost.keys == sum(int(group.cu_k[-1]) for group in groups)


@given(
    mask=masks(),
    limits=windows(),
    budget=st.sampled_from([1, 3000, 2**30]),
    has_sinks=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_width=st.sampled_from([4, 8, 12]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@example(PADDED, {}, 2**30, True, 2, 8, torch.float64, 0)
@example(PADDED, {"window": 4}, 3000, False, 2, 8, torch.float64, 0)
def test_output_and_gradients_equal_reference(
    mask, limits, budget, has_sinks, kv_heads, value_width, dtype, seed
):
    inputs = random_inputs(mask, kv_heads=kv_heads, value_width=value_width, dtype=dtype, seed=seed)
    options = {"sinks": torch.linspace(-1, 2, 4, dtype=dtype) if has_sinks else None, **limits}
    with mock.patch.object(varlen, "GROUP_BYTES", budget), empty_is_nan():
        ours = run(mask, *inputs, backend="varlen", **options)
    assert worst_ratio(ours, run_reference(mask, *inputs, **options)) < 1


def test_errors_stay_below_the_asked_bounds():
    mask = compile_mask(PrefixTree.from_turns([(30, 220, 80)] * 3))
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = random_inputs(mask, dtype=dtype)
        sinks = torch.linspace(-1, 2, 4, dtype=dtype)
        ours = run(mask, *inputs, backend="varlen", sinks=sinks, window=300)
        for x, y in zip(ours, run_reference(mask, *inputs, sinks=sinks, window=300), strict=True):
            assert (x - y).abs().max() <= bound * y.abs().max().clamp(min=1)


@pytest.mark.parametrize("layout", ["rows", "heads", "odd"])
def test_strides_and_a_shared_mask_do_not_matter(layout):
    q, k, v, dout = random_inputs(stack([CONVERSATION] * 2), dtype=torch.float32)
    inputs = [q, k, v, dout]
    if layout == "heads":
        inputs = [x.contiguous() for x in inputs]
    elif layout == "odd":
        inputs = [x.mT.contiguous().mT for x in inputs]
    ours = run(CONVERSATION, *inputs, backend="varlen", scale=0.7)
    references = run_reference(stack([CONVERSATION] * 2), q, k, v, dout, scale=0.7)
    assert worst_ratio(ours, references) < 1


def test_a_row_without_branches_is_not_gathered():
    mask = stack([mask_from_depths([*range(30), *range(30)]), mask_from_depths([*range(60)])])
    (group,) = planned(mask)
    assert group.keys == group.rows == slice(0, 120)
    assert group.cu_q.tolist() == group.cu_k.tolist() == [0, 30, 60, 120]


def test_sixteen_turns_take_one_call_and_no_more_keys_than_n_pass():
    tree = PrefixTree.from_turns([(60, 300, 120)] * 16)
    end = compile_mask([tree] * 3).subtree_end
    assert gather_cost(end).keys <= 3 * tree.num_sample_tokens
    q, k = (torch.empty(1, heads, 1, 128, dtype=torch.bfloat16) for heads in (32, 8))
    assert len(varlen.plan_calls(end, q, k)) == 1


@pytest.mark.parametrize("has_sinks", [False, True])
def test_compiles_as_one_graph_with_gradients(has_sinks):
    inputs = random_inputs(PADDED, dtype=torch.float32)

    def function(q, k, v, mask, *, sinks):
        return dispatch(q * 2, k, v, mask.subtree_end, sinks=sinks, backend="varlen") * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    sinks = torch.linspace(-1, 1, 4) if has_sinks else None
    ours = run(PADDED, *inputs, sinks=sinks, function=compiled)
    eager = run(PADDED, *inputs, sinks=sinks, function=function)
    for x, y in zip(ours, eager, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_contiguous", [False, True])
def test_operators_keep_their_promises(dtype, is_contiguous):
    tensors = random_inputs(PADDED, dtype=dtype)
    q, k, v, dout = (x.contiguous() if is_contiguous else x for x in tensors)
    sinks = torch.zeros(4, dtype=dtype, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    end = PADDED.subtree_end
    torch.library.opcheck(varlen._forward, (*leaves, end, sinks, 0.5, 3, None))
    with torch.no_grad():
        out, lse = varlen._forward(*leaves, end, sinks, 0.5, 3, None)
        torch.library.opcheck(varlen._backward, (dout, *leaves, end, out, lse, 0.5, 3, None))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_calls_fit_torch_s_own_operators(kv_heads):
    """Shapes, dtypes and arguments, as torch's meta kernels take them: nothing is computed."""
    inputs = random_inputs(CONVERSATION, kv_heads=kv_heads, dtype=torch.bfloat16)
    q, k, v, dout = (x.to("meta") for x in inputs)
    sinks, end = torch.zeros(4, device="meta"), CONVERSATION.subtree_end
    groups = [
        Group(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in group))
        for group in planned(CONVERSATION, window=9, budget=40)
    ]
    assert len(groups) > 1
    with mock.patch.multiple(
        varlen,
        plan_calls=lambda *_, **__: groups,
        plain_forward=torch.ops.aten._flash_attention_forward,
        plain_backward=torch.ops.aten._flash_attention_backward,
    ):
        out, lse = varlen._forward._init_fn(q, k, v, end, sinks, 0.5, 9, None)
        grads = varlen._backward._init_fn(dout, q, k, v, end, out, lse, 0.5, 9, None)
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((4, CONVERSATION.shape[1]), torch.float32)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


def test_refuses_what_the_kernels_do_not_have():
    q, k, v, _ = random_inputs(CONVERSATION)
    with pytest.raises(
        UnsupportedModelError, match="'varlen' takes no softcap; use backend='flex'"
    ):
        attention(q, k, v, CONVERSATION, softcap=2.0, backend="varlen")
    wide = torch.zeros(1, 2, CONVERSATION.shape[1], 264)
    with pytest.raises(UnsupportedModelError, match="heads at most 256 wide, got 264; use"):
        attention(wide, wide, wide, CONVERSATION, backend="varlen")


def test_refuses_the_capture_of_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(varlen, "is_capturing", lambda: True)
    taken = varlen.why_not(torch.device("cuda"), torch.bfloat16, 64, None)
    assert "capture of a CUDA graph" in taken


def test_widths_are_those_of_the_kernels():
    assert [varlen.padded_width(x) for x in (1, 8, 80, 100, 192, 193, 256)] == [
        *(8, 8, 80, 104, 192),
        *(256, 256),
    ]
