"""Triton's interpreter for tests: memory is watched, bf16 is right, and calls cost less.

A launch fails on the first address that lies outside its arguments, and at its end if two programs
wrote to one address. Arguments reach as far as their own elements, not as their storage.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch._inductor.runtime import triton_helpers
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def install():
    """Change the interpreter in this process."""
    _patch_language_once()
    _compute_bf16_in_fp32()
    _watch_memory()
    triton_helpers.libdevice.tanh = _tanh  # of libdevice inductor uses this one for a softcap


def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, -1, 1) * (1 - e) / (1 + e)


def _patch_language_once():
    """Put the interpreter's functions in the place of triton's for good, not for every call."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    # nor is every integer operation done again in int64
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


# ---- bf16, which the interpreter truncates to, and multiplies as the integers of its bits


def _wide(handle):
    """A handle's values in fp32 if they are bf16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle):
    """A handle's fp32 values in bf16, rounded to the nearest."""
    values = torch.from_numpy(np.ascontiguousarray(handle.data))
    bits = values.bfloat16().view(torch.uint16).numpy().reshape(handle.data.shape)
    return TensorHandle(bits, tl.bfloat16)


def _compute_bf16_in_fp32():
    """Operations on bf16 are exact in fp32, or rounded there, and then rounded to bf16."""
    builder = InterpreterBuilder
    cast, dot, unary, binary = (
        getattr(builder, name) for name in ("cast_impl", "create_dot", "unary_op", "binary_op")
    )

    def cast_impl(self, x, dst_type):
        if tl.bfloat16 not in (x.dtype.scalar, dst_type.scalar):
            return cast(self, x, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return _narrow(cast(self, _wide(x), tl.float32))
        return cast(self, _wide(x), dst_type)

    def operate(method, op, *operands):
        result = method(*map(_wide, operands), op)
        is_rounded = operands[0].dtype.scalar == tl.bfloat16 and result.data.dtype == np.float32
        return _narrow(result) if is_rounded else result

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, x, dst_type, rounding_mode: cast_impl(self, x, dst_type)
    builder.create_dot = lambda self, a, b, *rest: dot(self, _wide(a), _wide(b), *rest)
    builder.unary_op = lambda self, x, op: operate(partial(unary, self), op, x)
    builder.binary_op = lambda self, x, y, op: operate(partial(binary, self), op, x, y)


# ---- memory


class Watch:
    """The interpreter's memory functions, for a launch whose arguments are known."""

    def __init__(self, memory):
        self.memory = memory
        self.spans = []  # first byte, byte behind the last, index of the argument
        self.kernel = ""
        self.written = {}  # program -> addresses

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def begin(self, kernel, arguments):
        self.kernel, self.spans, self.written = kernel, [], {}
        for name, x in enumerate(arguments):
            x = getattr(x, "base", x) if hasattr(x, "block_shape") else x
            if isinstance(x, torch.Tensor) and x.numel():
                reach = (
                    sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
                    + 1
                )
                self.spans.append((x.data_ptr(), x.data_ptr() + reach * x.element_size(), name))

    def end(self):
        if len(self.written) > 1:
            addresses = np.concatenate(
                [np.unique(np.concatenate(x)) for x in self.written.values()]
            )
            num_twice = addresses.size - np.unique(addresses).size
            assert not num_twice, (
                f"programs of {self.kernel} write to the same {num_twice} addresses"
            )

    def check(self, verb, pointers, mask, itemsize):
        """The addresses that are not masked off; AssertionError if one lies outside."""
        touched = pointers[np.broadcast_to(np.asarray(mask, bool), pointers.shape)]
        if not touched.size:
            return touched
        low, high = int(touched.min()), int(touched.max()) + itemsize
        if any(first <= low and high <= last for first, last, _ in self.spans):
            return touched
        inside = np.zeros(touched.shape, bool)
        for first, last, _ in self.spans:
            inside |= (touched >= first) & (touched + itemsize <= last)
        if not inside.all():
            address = int(touched[~inside][0])
            first, last, name = min(self.spans, key=lambda span: abs(address - span[1]))
            raise AssertionError(
                f"{self.kernel} {verb} element {(address - first) // itemsize} of argument {name}, "
                f"which has {(last - first) // itemsize}"
            )
        return touched

    def load(self, pointers, mask, other, dtype):
        self.check("reads", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        touched = self.check("writes", pointers, mask, value.itemsize)
        program = tuple(interpreter.interpreter_builder.grid_idx)
        self.written.setdefault(program, []).append(touched)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, order):
        self.check("adds to", pointers, mask, value.itemsize)
        return self.memory.atomic_rmw(op, pointers, value, mask, order)


def _watch_memory():
    watch = interpreter._interpreter = Watch(interpreter._interpreter)
    to_host, to_device = GridExecutor._init_args_hst, GridExecutor._restore_args_dev

    def begin(self, *arguments):
        positional, named = to_host(self, *arguments)
        watch.begin(self.fn.__name__, [*positional, *named.values()])
        return positional, named

    def end(self, *arguments):
        to_device(self, *arguments)
        watch.end()

    GridExecutor._init_args_hst, GridExecutor._restore_args_dev = begin, end
