"""Where a measurement was made: device, threads, versions, date and load."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("flexmask", "torch", "transformers", "numpy")
_GPU_PACKAGES = ("triton", "flash-attn-4")


def device() -> str:
    """What a case for GPUs runs on: "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """The environment of this process as plain data; `device` is short enough for a file name.

    Args:
        device: "cpu" or "cuda", what the measured code runs on.
    """
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    packages = (*_PACKAGES, *_GPU_PACKAGES) if gpu else _PACKAGES
    return {
        "device": re.sub(r"[^a-z0-9]+", "-", gpu.lower()) if gpu else "cpu",
        **({"gpu": gpu, "cuda": torch.version.cuda} if gpu else {}),
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    """The processor's model name, with the widest vectors that its kernel announces."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)$", text, re.MULTILINE)
    name = model[1] if model else platform.machine()
    known = set(flags[1].split()) if flags else set()
    vectors = next((flag for flag in ("avx512f", "avx2", "avx") if flag in known), None)
    return f"{name}, {vectors}" if vectors else name


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
