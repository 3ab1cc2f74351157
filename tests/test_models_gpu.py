"""Whole models on a GPU, patched, against separate sequences: what families ask of a backend."""

import copy

import pytest
import torch
from gpu_cases import SHORT, step
from model_cases import tiny_model
from sample_cases import random_samples
from torch.utils.checkpoint import checkpoint

from flexmask import attention, build_tree, compile_mask, pack, patch
from flexmask.backends.flex import kept_graphs
from flexmask.model.npass import npass_batches

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3")  # what attention has to do
LATENT = {"head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
# FlexAttention may multiply fp32 in tf32, unless told otherwise
EPS = {"flex": 2.0**-10, "triton": torch.finfo(torch.float32).eps}
SAMPLES = random_samples(0, num_samples=4, stem=60, tail=20 if SHORT else 50)
CASES = [(family, backend) for family in FAMILIES for backend in EPS]
if SHORT:  # inductor's tiles of fp32 are small, and so too many
    CASES = [case for case in CASES if case[1] == "triton" or case[0] == "gpt_oss"]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_loss_and_gradients_equal_separate_sequences(family, backend):
    wide = LATENT if family == "deepseek_v3" else {"head_dim": 16}  # narrower is refused by flex
    model = tiny_model(family, max_position_embeddings=512, **wide).to("cuda")
    (row,) = pack([build_tree(SAMPLES)])
    count = sum(int((sample.loss_weights > 0).sum()) for sample in SAMPLES)
    loss, expected = step(copy.deepcopy(model), npass_batches(SAMPLES), count)
    ours = patch(model, backend=backend)
    our_loss, found = step(ours, [row.to_batch()], count)
    bound = 8 * EPS[backend] * row.input_ids.size**0.5
    assert abs(our_loss - loss) <= bound * loss
    scale = max(x.abs().max().item() for x in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max().item() <= bound * scale, name


def qkv(mask, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    B, L = mask.shape
    shapes = [(B, L, heads, 64) for heads in (8, 2, 2)]
    tensors = (torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in shapes)
    return [x.transpose(1, 2).requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", EPS)
def test_gradients_of_a_kept_graph_may_be_asked_for_twice(backend):
    mask = compile_mask([build_tree(SAMPLES)]).to("cuda")
    leaves = qkv(mask)
    out = attention(*leaves, mask, backend=backend)
    with kept_graphs():
        first, second = (
            torch.autograd.grad(out.float().sum(), leaves, retain_graph=True) for _ in range(2)
        )
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_flex_gives_the_same_gradients_under_checkpointing(use_reentrant):
    mask = compile_mask([build_tree(SAMPLES)]).to("cuda")
    leaves = qkv(mask)

    def attend(q, k, v):
        return attention(q, k, v, mask, backend="flex")

    plain = torch.autograd.grad(attend(*leaves).float().sum(), leaves)
    out = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    out.float().sum().backward()
    for leaf, gradient in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=2e-2, atol=2e-2)


def test_flex_compiles_as_one_graph_in_the_callers_graph():
    mask = compile_mask([build_tree(SAMPLES)]).to("cuda")
    leaves = qkv(mask)

    def function(q, k, v):
        return attention(q * 2, k, v, mask, backend="flex") * 4  # both exact in bf16

    expected = function(*leaves)
    found = torch.compile(function, fullgraph=True)(*leaves)
    dout = torch.randn_like(expected)
    for x, y in zip(
        (found, *torch.autograd.grad(found, leaves, dout)),
        (expected, *torch.autograd.grad(expected, leaves, dout)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["flex", "triton", "varlen"])
def test_autocast_gives_what_its_dtype_gives(backend):
    mask = compile_mask([build_tree(SAMPLES)]).to("cuda")
    leaves = qkv(mask, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(*leaves, mask, backend=backend)
    half = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = attention(*half, mask, backend=backend)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, half, dout)
    for x, y in zip(torch.autograd.grad(out, leaves, dout), wanted, strict=True):
        assert x.dtype == torch.float32
        error = (x - y.float()).abs().max()
        assert error <= torch.finfo(torch.bfloat16).eps * y.abs().max()  # sums in another order
