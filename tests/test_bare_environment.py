"""What is meant for a machine with a GPU starts with torch, triton, transformers, numpy, pytest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*_gpu.py"))
# nothing of this environment's own, and no device
ENVIRONMENT = os.environ | {"PYTHONPATH": ".:kernels", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments):
    command = [sys.executable, "tests/bare_environment.py", "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_tests_for_a_gpu_are_all_found_and_wait_for_a_device():
    result = run("pytest", "-p", "no:cacheprovider", *FILES)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " skipped" in result.stdout
    assert "passed" not in result.stdout


def test_the_kernels_benchmark_starts_and_asks_for_a_device():
    result = run("benchmarks", "kernels")
    assert result.returncode == 2
    assert result.stderr.startswith("kernels: needs a CUDA device")


def test_tests_for_a_gpu_are_in_files_of_that_name():
    for path in (ROOT / "tests").glob("test_*.py"):
        assert ("pytest.mark." + "gpu" in path.read_text()) == path.stem.endswith("_gpu"), path.name
