"""Which configuration a launch uses: the one measured on this machine, else the shipped one.

Measured ones are kept in one small file, by default ~/.cache/flexmask/configs.json (the directory
is FLEXMASK_CACHE, or XDG_CACHE_HOME/flexmask). A line is keyed on what the compiled code depends
on: kernel, chip, triton, dtype, head widths. The length of a row is no part of a key, so a new
length neither measures nor compiles anything. `autotune` writes the file, on request only: an
ordinary first call compiles one configuration per kernel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
import triton
from filelock import FileLock
from torch import Tensor

from flexmask_kernels.configs import Config, block_width, capability_of, default_config

_forced: ContextVar[dict[str, Config]] = ContextVar("forced configurations", default={})  # noqa: B039 (never written to)


def choose_config(kernel: str, q: Tensor, v: Tensor, *, is_plain: bool = True) -> Config:
    """The configuration to launch `kernel` with.

    Args:
        kernel: a name in `configs.KERNELS`.
        q: tensor of the device, dtype and head width [..., D].
        v: tensor of the head width [..., D_v].
        is_plain: without softcap and window; only such launches are measured.
    """
    forced = _forced.get()
    if kernel in forced:
        return forced[kernel]
    width = max(q.shape[-1], v.shape[-1])
    is_plain = is_plain and all(x.shape[-1] == block_width(x.shape[-1]) for x in (q, v))
    if is_plain:
        measured = _measured(cache_path()).get(config_key(kernel, q, v))
        if measured is not None:
            return measured
    return default_config(
        kernel, capability_of(q.device), width, q.element_size(), is_plain=is_plain
    )


@contextmanager
def forced_configs(configs: dict[str, Config]) -> Iterator[None]:
    """Use these configurations, by kernel, whatever was measured or shipped; in this thread."""
    token = _forced.set({**_forced.get(), **configs})
    try:
        yield
    finally:
        _forced.reset(token)


def config_key(kernel: str, q: Tensor, v: Tensor) -> str:
    """What a measured configuration holds for.

    >>> q = torch.empty(1, 8, 4096, 64)
    >>> config_key("forward", q, q).split(", ")[2:]
    ['float32', 'D64', 'D_v64']
    """
    chip = "interpreter"
    if q.device.type == "cuda":
        chip = torch.cuda.get_device_name(q.device)
    dtype = str(q.dtype).removeprefix("torch.")
    widths = f"D{q.shape[-1]}, D_v{v.shape[-1]}"
    return f"{kernel}, {chip} triton {triton.__version__}, {dtype}, {widths}"


def cache_path() -> Path:
    """The file of measured configurations; it may not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexmask"
    return Path(os.environ.get("FLEXMASK_CACHE") or home) / "configs.json"


def save_config(key: str, config: Config) -> None:
    """Keep a measured configuration; the file is replaced in one step, other lines stay.

    One process writes at a time, so that a line which another one has just written stays as well.
    """
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        lines = {name: list(line) for name, line in _read(path).items()}
        lines[key] = list(config)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
        draft.replace(path)
    _measured.cache_clear()


@cache
def _measured(path: Path) -> dict[str, Config]:
    """The measured configurations, read once in a process."""
    return _read(path)


def _read(path: Path) -> dict[str, Config]:
    """The lines of the file; an unreadable one counts as empty, it is only a cache."""
    try:
        return {key: Config(*line) for key, line in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
