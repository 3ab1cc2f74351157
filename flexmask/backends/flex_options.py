"""FlexAttention's kernel options: what is refused of them, and what a chip needs.

Names and meaning are those of `torch.nn.attention.flex_attention.FlexKernelOptions`. What the FLASH
kernels take is read from the sources of flash-attn-4 (`flash_attn/cute/interface.py`, August 2026)
and of torch 2.13 and 2.14 (`torch/_inductor/kernel/flex`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

from flexmask.errors import UnsupportedModelError

_TYPES = get_type_hints(FlexKernelOptions)
_TILES = (16, 32, 64, 128)  # tokens; those that divide a block
_UNTRUE = ("ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS")  # of packed trees, tile by tile
_KIB = 1024
_HAS_LSE_GRADIENT = torch.__version__ >= "2.14"


class Chip(NamedTuple):
    """What a GPU is: its compute capability, and bytes of shared memory that a program may have."""

    capability: tuple[int, int]
    shared_memory: int


def check_kernel_options(options: Mapping[str, Any] | None, backend: str) -> None:
    """Raise UnsupportedModelError for options that `backend` or FlexAttention does not take."""
    if options is None:
        return
    if backend != "flex":
        raise UnsupportedModelError(
            f"kernel_options are FlexAttention's: they need backend='flex', got {backend!r}"
        )
    if not isinstance(options, Mapping):
        raise UnsupportedModelError(
            f"kernel_options must be a dict of FlexAttention's options, got {options!r}"
        )
    for name, value in options.items():
        bare = str(name).removeprefix("fwd_").removeprefix("bwd_")
        if bare not in _TYPES:
            raise UnsupportedModelError(
                f"kernel_options: FlexAttention has no {name!r}; it has {', '.join(_TYPES)}, "
                "for one direction with fwd_ or bwd_ before them"
            )
        allowed = _allowed(bare)
        if value not in allowed or type(value) is not type(allowed[0]):
            raise UnsupportedModelError(
                f"kernel_options: {name} must be {_listed(allowed)}, got {value!r}"
            )
        if bare in _UNTRUE and value:
            raise UnsupportedModelError(
                f"kernel_options: {name} is not true of packed trees, whose tiles have rows that "
                "see nothing; leave it out"
            )
    compiles = torch.compiler.is_compiling()  # which does not look for packages
    if options.get("BACKEND") == "FLASH" and not compiles and not has_flash():
        raise UnsupportedModelError(
            "kernel_options: BACKEND='FLASH' needs the package flash-attn-4, which is not "
            "installed; pip install --pre flash-attn-4, or leave BACKEND out"
        )


def _allowed(name: str) -> range | tuple[Any, ...]:
    """The values of an option."""
    kind = _TYPES[name]
    if get_origin(kind) is Literal:  # without the kernel for decoding
        return tuple(value for value in get_args(kind) if value != "TRITON_DECODE")
    if kind is bool:
        return (True, False)
    return _TILES if name.startswith("BLOCK") else range(1, 65)


def _listed(values: range | tuple[Any, ...]) -> str:
    if isinstance(values, range):
        return f"a number from {values[0]} to {values[-1]}"
    return f"one of {', '.join(map(str, values))}"


def has_flash() -> bool:
    """Whether flash-attn-4, whose kernels BACKEND="FLASH" calls, is installed."""
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


def complete(
    options: Mapping[str, Any] | None,
    chip: Chip | None,
    width: int,
    value_width: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Options with what they leave out and the chip or the mask needs.

    The chip is None for devices that are no NVIDIA GPU, where tiles are left to inductor. Rows
    below 128 tokens with more than 128 queries of one key head have no tiles in the kernel for
    decoding, where inductor's search then fails: it is kept out.

    Raises:
        UnsupportedModelError: heads for which the chip has not enough memory.
    """
    given = {name: x for name, x in (options or {}).items() if (name, x) != ("BACKEND", "AUTO")}
    if given.get("BACKEND") == "FLASH":
        return given
    if "BACKEND" not in given:
        given.setdefault("FORCE_USE_FLEX_ATTENTION", True)
    fitting = {} if chip is None else fitting_tiles(chip.shared_memory, width, value_width, dtype)
    missing = {name: x for name, x in fitting.items() if not {name, name[4:]} & given.keys()}
    return missing | given


def fitting_tiles(
    shared_memory: int, width: int, value_width: int, dtype: torch.dtype
) -> dict[str, int]:
    """Options for heads whose tiles, as inductor chooses them, take too much shared memory.

    A forward pass takes about BLOCK_M + 2 (num_stages - 1) BLOCK_N rows of a head, whose width is
    rounded up to a power of two: in bf16 for heads of 256 152 KiB of the 99 that sm_86, sm_89 and
    sm_120 have, for heads of 160 168 of the 163 of sm_80. The sizes here, compiled for these chips,
    take at most 96 and 104.

    Args:
        shared_memory: bytes that a program may have.
        width: of queries and keys.
        value_width: of values.
        dtype: of all.

    Raises:
        UnsupportedModelError: nothing fits.
    """
    widest, padded = max(width, value_width), 16
    while padded < widest:
        padded *= 2
    row = padded * dtype.itemsize  # bytes
    is_small = shared_memory < 128 * _KIB  # sm_86, sm_89, sm_120
    if row <= 256 or (row == 512 and shared_memory > 192 * _KIB):
        return {}
    if row > 2048 or (row == 2048 and is_small):
        raise UnsupportedModelError(
            f"backend 'flex' has no tiles for heads of {widest} in "
            f"{str(dtype).removeprefix('torch.')} in {shared_memory // _KIB} KiB of shared memory; "
            "use backend='reference'"
        )
    if not is_small and (width in (64, 128, 256) or (width == 192 and dtype.itemsize == 2)):
        return {}  # inductor has tiles for these widths, and they fit
    if row == 512:
        if not is_small:
            return {"fwd_num_stages": 2}
        backward = _tiles("bwd", BLOCK_M1=32, BLOCK_N1=64, BLOCK_M2=64, BLOCK_N2=32, num_stages=1)
        forward = _tiles("fwd", BLOCK_M=32, BLOCK_N=64, num_stages=2, num_warps=4)
        return forward if dtype.itemsize == 4 else forward | backward
    key_tile = 32 if row == 1024 and not is_small else 16
    return _tiles("fwd", BLOCK_M=32, BLOCK_N=key_tile, num_stages=2, num_warps=4)


def _tiles(direction: str, **sizes: int) -> dict[str, int]:
    return {f"{direction}_{name}": size for name, size in sizes.items()}


def flash_block(
    chip: Chip | None, width: int, value_width: int, dtype: torch.dtype, *, has_sinks: bool
) -> tuple[int, int]:
    """Queries and keys of a block of the mask that the FLASH kernels take, forward and backward.

    Raises:
        UnsupportedModelError: a chip (None as in `complete`), width, dtype or sinks that they do
            not take.
    """
    if has_sinks and not _HAS_LSE_GRADIENT:
        raise UnsupportedModelError(
            "kernel_options: sinks with BACKEND='FLASH' need torch 2.14, for the gradient of the "
            f"logsumexp, got {torch.__version__}; leave BACKEND out"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"kernel_options: BACKEND='FLASH' takes bf16 and fp16, got {dtype}; leave BACKEND out"
        )
    widest = max(width, value_width)
    major = 0 if chip is None else chip.capability[0]
    if major == 9 and widest <= 128:
        return 128, 128
    if major in (10, 11) and widest <= 128:
        return 256, 128  # two tiles of queries at once
    if major in (10, 11) and (width, value_width) == (192, 128):
        return 256, 256  # two tiles of keys, for a pair of programs backward
    if major not in (9, 10, 11):
        device = "no NVIDIA GPU" if chip is None else f"sm_{chip.capability[0]}{chip.capability[1]}"
        raise UnsupportedModelError(
            "kernel_options: BACKEND='FLASH' takes blocks of a mask on sm_90, sm_100 and sm_110, "
            f"got {device}; leave BACKEND out"
        )
    # sm_90: blocks must be the tiles, which have 112 to 128 or 80 keys forward, 96 or 64 backward
    raise UnsupportedModelError(
        f"kernel_options: BACKEND='FLASH' takes heads of at most 128 with blocks of a mask, got "
        f"{widest}; leave BACKEND out"
    )
