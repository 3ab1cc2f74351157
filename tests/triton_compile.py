"""What the launchers launch, compiled for a chip that is not there."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from flexmask_kernels import backward_pass, tuning
from flexmask_kernels.backward_pass import backward
from flexmask_kernels.configs import Config
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Inputs, Options
from sass import BRANCHES, NAMES, Instruction, Loop, innermost_loops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flexmask import PrefixTree, compile_mask

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MASK = compile_mask(PrefixTree.from_turns([(60, 100, 80)] * 2))


class Launch(NamedTuple):
    """A kernel and its keyword arguments, tensors included."""

    kernel: JITFunction
    arguments: dict

    @property
    def name(self):
        name = self.kernel.__name__.removesuffix("_kernel")
        return "backward_fused" if self.arguments.get("ADDS_DQ") else name

    @property
    def config(self):
        names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages", "USE_TMA")
        return Config(*(self.arguments[name] for name in names))


class Binary(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    stack: int  # bytes a thread, where spilled registers go
    shared: int  # bytes a program
    ptx: str
    cubin: bytes
    loops: list[Loop]  # over full tiles, over partial ones


def launches(
    capability,
    *,
    width,
    value_width=None,
    dtype=torch.bfloat16,
    sinks=None,
    has_window=False,
    **options,
):
    """One launch of every kernel, of both modes of the backward pass, on CPU tensors."""
    inputs = zero_inputs(MASK, width, value_width, dtype, sinks=sinks, has_window=has_window)
    options = Options(0.1, **options)
    recorded = {}

    def record(kernel, *, grid, warmup, **arguments):
        found = Launch(kernel, arguments)
        recorded.setdefault(found.name, found)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tuning, "capability_of", return_value=capability),
        mock.patch.object(backward_pass, "capability_of", return_value=capability),
        mock.patch.object(backward_pass, "num_processors", return_value=132),
    ):
        out, lse2 = forward(inputs, options)
        for deterministic in (True, False):
            backward(out, inputs, out, lse2, options, deterministic=deterministic)
    return recorded


def zero_inputs(
    mask, width, value_width=None, dtype=torch.bfloat16, *, sinks=None, has_window=False
):
    """Inputs on the CPU, laid out as models do: 8 query heads, 2 key heads."""
    shape = (1, mask.shape[1], 8, width)
    q, k = torch.zeros(shape, dtype=dtype), torch.zeros(*shape[:2], 2, width, dtype=dtype)
    v = torch.zeros(*shape[:2], 2, value_width or width, dtype=dtype)
    start = mask.subtree_end if has_window else None
    return Inputs(*(x.transpose(1, 2) for x in (q, k, v)), mask.subtree_end, start, sinks)


class AbsentDriver:
    """Triton's view of a GPU that is not there: enough to compile for, nothing to run on."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # compiled code is kept by device: one for each chip

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def absent_gpu(capability):
    """Launches take CPU tensors in here, and end when they are compiled."""
    run = JITFunction.run

    def compile_only(kernel, *, grid, warmup, **arguments):
        return run(kernel, grid=grid, warmup=True, **arguments)

    with (
        mock.patch.object(driver, "_active", AbsentDriver(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tuning, "capability_of", return_value=capability),
        mock.patch.object(backward_pass, "capability_of", return_value=capability),
        mock.patch.object(backward_pass, "num_processors", return_value=132),
    ):
        yield


def compile_launch(found, capability):
    """Compile as the launch itself would: sizes are unknown, strides multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(found.kernel.params):
        name, value = parameter.name, found.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            dtype = TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{dtype}{value.block_shape}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(found.kernel, signature, constants, attributes)
    options = {"enable_fp_fusion": True}
    options |= {name: found.arguments[name] for name in OPTIONS if name in found.arguments}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return binary_of(compiled, capability)


def binary_of(compiled, capability):
    """What there is to know of a kernel that triton has compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    ptx, cubin = (compiled.asm[kind] for kind in ("ptx", "cubin"))
    loops = innermost_loops(cubin, capability)
    return Binary(registers, stack + local, compiled.metadata.shared, ptx, cubin, loops)


def disassembled(cubin):
    """What `sass.decode` should say, from NVIDIA's disassembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [CUOBJDUMP, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", text):
        guard, name, rest = re.fullmatch(r"(@\S+ )?(\S+) ?(.*)", line).groups()
        short = name if name in ("MUFU.EX2", "BRA.U") else name.partition(".")[0]
        target = re.search(r"\b0x([0-9a-f]+)$", rest) if short in BRANCHES else None
        found.append(
            Instruction(
                short if short in NAMES else "",
                int(target[1], 16) // 16 if target else None,
                bool(guard) or short not in ("BRA", "EXIT", "RET"),
            )
        )
    return found
