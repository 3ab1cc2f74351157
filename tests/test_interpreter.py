"""Starts the tests of Triton kernels in Triton's interpreter, each file in a process of its own.

Kernels are interpreted only if TRITON_INTERPRET=1 is set before they are imported, which it is not
in an ordinary run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = ("test_triton_interpreter.py", "test_kernel_benchmark.py", "test_liger.py")


@pytest.mark.processes
@pytest.mark.parametrize("name", FILES)
def test_file_passes_in_the_interpreter(name):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name(name)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
