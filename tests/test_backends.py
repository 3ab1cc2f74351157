"""`attention`: the reference against separate paths, the choice of a backend, and refusals."""

import math
import re

import pytest
import torch
from backend_cases import (
    check_autocast,
    mask_from_depths,
    random_inputs,
    run,
    stack,
    windowed,
    within_window,
    worst_ratio,
)
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import masks, windows

from flexmask import FlexmaskError, PrefixTree, TreeMask, attention, compile_mask
from flexmask.backends import choice, choose_backend
from flexmask.backends.api import dispatch
from flexmask.backends.choice import Call, record_choices
from flexmask.backends.reference import MAX_TOKENS
from flexmask.errors import MaskError, UnsupportedModelError

MASK = mask_from_depths([0, 1, 2, 1, 2, 0, 0])


def attention_by_paths(q, k, v, mask, *, sinks=None, scale=0.5, softcap=None, **limits):
    """Token by token, head by head, over the list of keys that it sees."""
    B, H, L, _ = q.shape
    out = torch.empty(B, H, L, v.shape[-1], dtype=q.dtype)
    visible = within_window(mask, **limits)
    for b in range(B):
        for token in range(L):
            keys = visible[b, token].nonzero()[:, 0]
            for h in range(H):
                h_kv = h * k.shape[1] // H
                scores = scale * (k[b, h_kv, keys] @ q[b, h, token])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores)
                total = weights.sum() + (0 if sinks is None else math.exp(sinks[h]))
                out[b, h, token] = weights @ v[b, h_kv, keys] / total
    return out


@given(
    mask=masks(max_rows=2, max_tokens=12),
    limits=windows(max_positions=6),
    softcap=st.sampled_from([None, 1.5]),
    has_sinks=st.booleans(),
)
def test_reference_equals_attention_over_each_path(mask, limits, softcap, has_sinks):
    q, k, v, _ = random_inputs(mask)
    options = {"scale": 0.5, "softcap": softcap, **limits}
    options["sinks"] = torch.linspace(-1, 1, 4, dtype=torch.float64) if has_sinks else None
    ours = attention(q, k, v, mask, backend="reference", **options)
    assert worst_ratio([ours], [attention_by_paths(q, k, v, mask, **options)]) < 1


def test_reference_gradients_pass_gradcheck():
    q, k, v, _ = random_inputs(MASK, width=2, value_width=3)
    sinks = torch.zeros(4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]

    def function(q, k, v, sinks):
        return attention(q, k, v, MASK, sinks=sinks, softcap=2.0, window=2, backend="reference")

    assert torch.autograd.gradcheck(function, inputs)


def test_reference_compiles_as_one_graph_with_gradients():
    inputs = random_inputs(MASK)

    def function(q, k, v, mask, *, sinks):
        return dispatch(q, k, v, mask.subtree_end, backend="reference")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = run(MASK, *inputs, function=compiled)
    assert worst_ratio(ours, run(MASK, *inputs, function=function)) < 1


def test_reference_computes_low_precision_in_fp32():
    q, k, v, _ = random_inputs(MASK, dtype=torch.bfloat16)
    out = attention(q, k, v, MASK, backend="reference")
    exact = attention(q.double(), k.double(), v.double(), MASK, backend="reference")
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_attention_returns_the_shape_of_v(backend):
    q, k, v, _ = random_inputs(MASK, value_width=5)
    out = attention(q, k, v, MASK, backend=backend)
    assert out.shape == (1, 4, 7, 5)
    assert out.dtype == q.dtype


@pytest.mark.parametrize("backend", ["reference", "cpu", "varlen"])
def test_autocast_casts_as_for_sdpa_and_ends_at_the_backend(backend):
    check_autocast(MASK, backend)


def test_autocast_compiles_as_one_graph():
    check_autocast(MASK, "cpu", torch.compile(fullgraph=True, backend="aot_eager"))


def test_attention_takes_a_mask_inside_torch_compile():
    q, k, v, _ = random_inputs(MASK)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(q, k, v, subtree_end, position_ids):
        return attention(q, k, v, TreeMask(subtree_end, position_ids), window=2)

    ours = function(q, k, v, MASK.subtree_end, MASK.position_ids)
    assert torch.equal(ours, attention(q, k, v, MASK, window=2))


def test_auto_takes_cpu_on_cpu_and_says_why():
    assert choose_backend("cpu").name == "cpu"
    assert "backward" in choose_backend("cpu").reason


LONG_CHAINS = compile_mask(PrefixTree.from_turns([(300, 2200, 800)] * 3)).subtree_end
SHORT_CHAINS = compile_mask(PrefixTree.from_turns([(3000, 20, 8), *[(5, 20, 8)] * 30])).subtree_end
NO_BRANCHES = torch.arange(1, 9).repeat_interleave(30)[None] * 30


@pytest.mark.parametrize(
    ("call", "name", "reason"),
    [
        (None, "varlen", "FlashAttention's kernels"),
        (Call(subtree_end=LONG_CHAINS), "varlen", "gathered paths"),
        (Call(subtree_end=NO_BRANCHES), "varlen", "gathered paths"),
        (Call(subtree_end=SHORT_CHAINS), "flex", r"would gather [\d,]+ keys for [\d,]+ pairs"),
        (Call(subtree_end=LONG_CHAINS, window=50), "flex", "would gather"),
        (Call(dtype=torch.float32), "flex", "'varlen' takes bf16 and fp16, got torch.float32"),
        (Call(width=320), "flex", "'varlen' takes heads at most 256 wide, got 320"),
        (Call(softcap=30.0), "flex", "'varlen' takes no softcap"),
    ],
)
def test_auto_takes_varlen_on_cuda_where_it_applies(call, name, reason):
    choice = choose_backend("cuda", call=call)
    assert choice.name == name
    assert re.search(reason, choice.reason)


def test_choices_are_counted_call_by_call():
    q, k, v, _ = random_inputs(MASK)
    with record_choices() as counts:
        attention(q, k, v, MASK)
        attention(q, k, v, MASK, backend="varlen")
        attention(q, k, v, MASK)
    attention(q, k, v, MASK)
    assert [(choice.name, count) for choice, count in counts.items()] == [("cpu", 2), ("varlen", 1)]


def test_triton_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(choice, "_HAS_TRITON", False)
    with pytest.raises(UnsupportedModelError, match=r"pip install .*or use backend='flex'"):
        choose_backend("cuda", "triton")


@pytest.mark.parametrize(
    ("device", "backend", "error", "message"),
    [
        ("cpu", "dense", MaskError, r"backend must be 'auto' or one of reference.*got 'dense'"),
        ("cpu", "triton", MaskError, r"'triton' needs CUDA tensors, got cpu; use backend='cpu'"),
        ("cuda", "cpu", MaskError, r"backend 'cpu' needs CPU tensors, got cuda; use.*'flex'"),
        ("mps", "cpu", MaskError, r"backend 'cpu' needs CPU tensors, got mps; use.*'reference'"),
        ("mps", "flex", MaskError, r"'flex' needs CUDA or CPU tensors, got mps; use.*'reference'"),
        ("mps", "varlen", MaskError, r"'varlen' needs CUDA or CPU tensors, got mps; use.*'ref"),
    ],
)
def test_rejects_a_backend_that_cannot_run(device, backend, error, message):
    with pytest.raises(error, match=message):
        choose_backend(device, backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (4, 7, 8)}, r"q must be 4-D and not empty, got \[4, 7, 8\]"),
        ({"k": (1, 2, 6, 8)}, r"k must be \[B, H_kv, L, D\] = \[1, 2, 7, 8\], got \[1, 2, 6, 8\]"),
        ({"k": (1, 2, 7, 4)}, r"k must be \[B, H_kv, L, D\] = \[1, 2, 7, 8\], got \[1, 2, 7, 4\]"),
        ({"v": (1, 1, 7, 8)}, r"v must be \[B, H_kv, L, D_v\] = \[1, 2, 7, 8\]"),
        ({"q": (1, 3, 7, 8)}, r"H must be a multiple of H_kv, got 3 query heads and 2 key heads"),
        ({"sinks": (2,)}, r"sinks must be \[H\] = \[4\], got \[2\]"),
        ({"q": (2, 4, 7, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8), "rows": 3}, r"mask must be"),
        ({"q": (1, 4, 5, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8)}, r"mask must be \[B, L\] = "),
    ],
)
def test_rejects_shapes_that_do_not_fit(changes, message):
    shapes = {"q": (1, 4, 7, 8), "k": (1, 2, 7, 8), "v": (1, 2, 7, 8), **changes}
    mask = stack([MASK] * shapes.pop("rows", 1))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(MaskError, match=message):
        attention(mask=mask, **tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be above 0 and finite, got 0.0"),
        ({"scale": float("inf")}, "scale must be above 0 and finite, got inf"),
        ({"softcap": 0.0}, "softcap must be above 0 and finite, got 0.0; leave it out for none"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
    ],
)
def test_rejects_options_out_of_range(options, message):
    q, k, v, _ = random_inputs(MASK)
    with pytest.raises(MaskError, match=message):
        attention(q, k, v, MASK, **options)


def test_rejects_mixed_dtypes_and_devices():
    q, k, v, _ = random_inputs(MASK)
    with pytest.raises(MaskError, match=r"v must have the dtype of q, torch.float64.*cast it"):
        attention(q, k, v.float(), MASK)
    with pytest.raises(MaskError, match=r"q must be fp64, fp32, bf16 or fp16, got torch.int64"):
        attention(q.long(), k.long(), v.long(), MASK)
    with pytest.raises(MaskError, match="k must be on the device of q, cpu, got meta"):
        attention(q, k.to("meta"), v, MASK)
    with pytest.raises(MaskError, match=r"mask must be on the device of q.*use mask.to\('cpu'\)"):
        attention(q, k, v, MASK.to("meta"))


def test_a_window_is_the_mask_s_or_the_argument_s():
    q, k, v, _ = random_inputs(MASK)
    limited = windowed(MASK, window=2, chunk=2)
    found = [
        attention(q, k, v, limited),
        attention(q, k, v, MASK, window=2, chunk=2),
        attention(q, k, v, windowed(MASK, window=2), chunk=2),
        attention(q, k, v, limited, window=2),
    ]
    for out in found[1:]:
        assert torch.equal(out, found[0])
    with pytest.raises(MaskError, match="window must be that of the mask, 2, got 3; leave it out"):
        attention(q, k, v, limited, window=3)
    with pytest.raises(MaskError, match="chunk must be that of the mask, 2, got 1; leave it out"):
        attention(q, k, v, limited, chunk=1)


def test_reference_refuses_long_rows():
    q = torch.zeros(1, 1, MAX_TOKENS + 1, 1)
    mask = TreeMask(torch.arange(1, MAX_TOKENS + 2))
    with pytest.raises(UnsupportedModelError, match=f"rows of at most {MAX_TOKENS} tokens, got"):
        attention(q, q, q, mask, backend="reference")


def test_errors_are_flexmask_errors():
    with pytest.raises(FlexmaskError):
        choose_backend("cpu", "nothing")
