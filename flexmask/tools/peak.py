"""Peak memory of this process, from a moment on.

`ru_maxrss` alone would not do: Linux hands the parent's peak on to a child. The high-water mark of
the process's own memory can be set back, so only what comes after is counted.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> int:
    """Forget the peak so far, where the system can, and return the bytes held now."""
    if not _CLEAR.exists():
        return peak_bytes()
    _CLEAR.write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most bytes that this process has held since `reset_peak`."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no line {name}")
