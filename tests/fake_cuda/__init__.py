"""CUDA for tests on a machine without a GPU: tests/conftest.py installs it where FAKE_CUDA is set.

    FAKE_CUDA=90 python -m pytest tests/test_backends_gpu.py

The number is the compute capability that torch and triton are told. Tensors on CUDA lie in host
memory (device.cpp, library.py), torch.cuda has one GPU (gpu.py), and Triton kernels, inductor's and
ours, run in Triton's interpreter with their memory watched (interpreter.py), or with
TRITON_INTERPRET=0 are compiled and not run (compiled.py). What this cannot show is in
docs/kernels.md.
"""

import os


def install(capability):
    """Give torch and triton a GPU of this compute capability; before either is imported."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from fake_cuda import library

    library.load()
    from fake_cuda import gpu

    gpu.install(capability)
    if os.environ["TRITON_INTERPRET"] == "1":
        from fake_cuda import interpreter

        interpreter.install()
