"""The stand-in for a GPU finds what it is there to find."""

import copy

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def add_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + token, token < length) + 1
    tl.store(y_ptr + token, y, token < length)


@triton.jit
def same_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    token = tl.arange(0, BLOCK)
    tl.store(y_ptr + token, tl.load(x_ptr + token) + tl.program_id(0))


@triton.jit
def dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tile)
    tl.store(y_ptr + tile, tl.dot(x, x * x).to(tl.bfloat16))


def test_a_kernel_runs_in_the_interpreter():
    x, y = torch.arange(100, device="cuda", dtype=torch.float32), torch.empty(100, device="cuda")
    add_kernel[(2,)](x, y, 100, BLOCK=64)
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("verb", ["reads", "writes"])
def test_a_kernel_fails_at_memory_that_is_not_its_own(verb):
    whole, part = torch.zeros(2, 128, device="cuda"), torch.zeros(128, device="cuda")[:100]
    x, y = (part, whole[0]) if verb == "reads" else (whole[0], part)
    with pytest.raises(InterpreterError, match=f"{verb} element 100 of argument ., which has 100"):
        add_kernel[(2,)](x, y, 128, BLOCK=64)


def test_a_kernel_fails_where_two_programs_write():
    x, y = torch.zeros(2, 64, device="cuda")
    with pytest.raises(AssertionError, match="programs of same_kernel write to the same 32"):
        same_kernel[(2,)](x, y, BLOCK=32)


def test_bf16_is_rounded_as_torch_does():
    x = torch.randn(32, 32, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    dot_kernel[(1,)](x, y, BLOCK=32)
    torch.testing.assert_close(y, (x.float() @ (x * x).float()).bfloat16(), rtol=2**-8, atol=1e-6)


def test_memory_is_nan_until_it_is_written():
    assert torch.empty(3, device="cuda").isnan().all()


def test_tensors_of_two_devices_do_not_meet():
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, torch.ones(4)])
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.linear(x, torch.ones(4, 4))


def test_views_and_copies_are_those_of_torch():
    x = torch.arange(12.0, device="cuda").view(3, 4)
    x[:, 1:3].t().add_(100)
    assert x.tolist()[1] == [4, 105, 106, 7]
    assert x.split(2, dim=1)[1]._base is x._base
    y = copy.deepcopy(x)
    y.zero_()
    assert x.sum().item() == 666
    assert torch.resize_as_(torch.empty(0, device="cuda"), x).shape == x.shape
