"""Builds device.cpp, which takes about 15 s once, and loads it into torch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-w")


def load():
    """Load the device; torch, which asks for CUDA as it is imported, must not have been."""
    if "torch" in sys.modules:
        raise RuntimeError("fake_cuda must be installed before torch is imported")
    package = Path(find_spec("torch").origin).parent
    libraries = package / "lib"
    # torch brings an OpenMP of its own, and would load it by its path
    own = [*libraries.glob("libgomp*.so*"), libraries / "libc10.so", libraries / "libtorch_cpu.so"]
    for library in (*own, _built(package)):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _built(package):
    """The library of this source for this torch, kept in the environment if that is writable."""
    key = hashlib.sha256(SOURCE.read_bytes() + repr((version("torch"), FLAGS)).encode()).hexdigest()
    home = sys.prefix if os.access(sys.prefix, os.W_OK) else tempfile.gettempdir()
    library = Path(home) / "fake_cuda" / f"device-{key[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("FAKE_CUDA needs a C++ compiler, found none; install g++ or set CXX")
    library.parent.mkdir(exist_ok=True)
    draft = library.with_suffix(f".{os.getpid()}")
    paths = [f"-I{package / 'include'}", f"-L{package / 'lib'}"]
    command = [compiler, *FLAGS, SOURCE, *paths, "-lc10", "-ltorch_cpu", "-o", draft]
    subprocess.run(command, check=True)
    return draft.replace(library)
