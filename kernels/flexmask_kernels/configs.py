"""Tile sizes, warps and pipeline stages of each kernel, by device and head width.

The table below was chosen by compiling: with every configuration each score and each exponential is
computed once, no loop spills registers, the shared memory is that of the chip, and the instructions
for each pair are the fewest found (docs/kernels.md). None was timed, because no GPU was at hand;
`tuning` replaces a line by a measured one. A choice depends on the width of a head, the size of an
element and the chip, never on the length of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNELS = ("forward", "backward_queries", "backward_keys", "backward_fused")
BY_KEY = ("backward_keys", "backward_fused")  # whose programs own keys
MAX_WIDTH = 256
# lines of a key head that start before it is the turn of the next, in `backward_keys.turn_of`
NUM_ROUND = 64


class Config(NamedTuple):
    """Tile size in tokens, warps of a program, stages of its pipelined loops.

    With `use_tma`, from sm_90 on, what a loop walks is read by tensor descriptors (`descriptors`).
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool = False


# {kernel: {widest head at most: Config}} of 2-byte elements, Hopper: 227 KB of shared memory
_HOPPER: dict[str, dict[int, Config]] = {
    "forward": {
        64: Config(128, 128, 8, 2),
        128: Config(128, 64, 8, 3),
        256: Config(128, 64, 8, 2),
    },
    "backward_queries": {
        64: Config(128, 64, 8, 3),
        128: Config(128, 64, 8, 2),
        256: Config(128, 32, 8, 2),
    },
    "backward_keys": {
        64: Config(64, 128, 8, 2),
        128: Config(64, 128, 8, 2),
        256: Config(64, 32, 8, 2),
    },
    "backward_fused": {
        64: Config(64, 128, 8, 2),
        128: Config(64, 128, 8, 2),
        256: Config(64, 32, 8, 1),
    },
}
# Blackwell's products are summed in a memory of their own, which changes what spills
_BLACKWELL = _HOPPER | {
    "forward": _HOPPER["forward"] | {256: Config(128, 32, 8, 2)},
    "backward_fused": _HOPPER["backward_fused"] | {256: Config(32, 64, 8, 2)},
}
# of either, with a softcap, a window, or head widths that are padded, which all take registers
_NARROW: dict[str, dict[int, Config]] = {
    "forward": {256: Config(128, 32, 8, 2)},
    "backward_queries": {},
    "backward_keys": {128: Config(32, 128, 8, 2)},
    "backward_fused": {128: Config(32, 128, 8, 2)},
}
# the same where only 99 KB are sure: Ampere, Ada, and Blackwell's workstation chips
_SMALL: dict[str, dict[int, Config]] = {
    "forward": {
        64: Config(128, 64, 4, 3),
        128: Config(128, 64, 8, 2),
        256: Config(64, 32, 4, 2),
    },
    "backward_queries": {
        64: Config(128, 64, 8, 2),
        128: Config(64, 64, 4, 2),
        256: Config(64, 32, 4, 1),
    },
    "backward_keys": {
        64: Config(64, 128, 8, 2),
        128: Config(32, 64, 4, 2),
        256: Config(32, 32, 4, 1),
    },
    "backward_fused": {
        64: Config(32, 64, 4, 2),
        128: Config(32, 64, 4, 2),
        256: Config(32, 32, 4, 1),
    },
}
# A100 and Orin have 163 KB
_AMPERE = _SMALL | {"backward_fused": _SMALL["backward_fused"] | {256: Config(64, 32, 8, 1)}}
# fp32 is multiplied without tensor cores, operand by operand from shared memory
_SINGLE: dict[int, Config] = {
    64: Config(32, 32, 8, 1),
    128: Config(16, 16, 8, 1),
    256: Config(16, 16, 8, 1),
}
_INTERPRETER = Config(16, 16, 1, 1)


def block_width(width: int) -> int:
    """The power of two that a head of `width` columns is padded to, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def default_config(
    kernel: str, capability: int, width: int, element_size: int, *, is_plain: bool = True
) -> Config:
    """The shipped configuration of `kernel`.

    Args:
        kernel: one of KERNELS; "backward_fused" is "backward_keys" with dq.
        capability: 10 * major + minor of the compute capability; 0 in the interpreter.
        width: the larger of D and D_v.
        element_size: bytes of an element of q.
        is_plain: no softcap, no window, and heads that fill their block.
    """
    if capability == 0:
        return _INTERPRETER
    if element_size == 4:
        table = _SINGLE
    elif 90 <= capability < 120:
        table = (_HOPPER if capability < 100 else _BLACKWELL)[kernel]
        if not is_plain:
            table = table | _NARROW[kernel]
    else:
        table = (_AMPERE if capability in (80, 87) else _SMALL)[kernel]
    return next(config for widest, config in table.items() if width <= widest)


def transposes_dq(capability: int, width: int) -> bool:
    """Whether `backward_fused` computes dq as the transpose of k^T ds.

    Both operands then come from shared memory, where Hopper and Blackwell read them, which saves
    32 registers. Other chips read all operands from registers, and a wide dq^T takes more of them.
    """
    return 100 <= capability < 120 or (90 <= capability < 100 and width <= 128)


def capability_of(device: torch.device) -> int:
    """10 * major + minor of a CUDA device, 0 for the CPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_processors(device: torch.device) -> int:
    """Programs that run at one time at least: the multiprocessors of a CUDA device, else 4."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_head_splits(group: int, num_programs: int, processors: int) -> int:
    """The fewest programs to split a group's heads over so that 8 are there for each processor.

    The result divides `group`. Splits cost memory (a dk and dv each, in fp32) and traffic, which
    long rows cannot afford and do not need.

    Args:
        group: query heads per key head.
        num_programs: programs without a split, blocks of keys times key heads times rows.
        processors: of the device.
    """
    divisors = [split for split in range(1, group + 1) if group % split == 0]
    return next((s for s in divisors if num_programs * s >= 8 * processors), group)
