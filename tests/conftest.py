"""Settings and fixtures that tests share."""

import gc
import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too

import pytest

if "FAKE_CUDA" in os.environ:  # tests for a GPU without one: of this compute capability, as in 90
    import fake_cuda

    fake_cuda.install(int(os.environ["FAKE_CUDA"]))

import torch

torch.set_num_threads(1)
if find_spec("hypothesis") is not None:  # which the tests for a GPU do without
    from hypothesis import settings

    settings.register_profile("flexmask", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("flexmask")

collect_ignore = [] if "FAKE_CUDA" in os.environ else ["fake_cuda"]
if find_spec("triton") is None:
    collect_ignore += ["test_triton_interpreter.py", "test_kernel_benchmark.py"]


def pytest_collection_modifyitems(items):
    """Put the longest tests first, so that workers end together; skip what cannot run here."""
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)
    missing = {}
    if os.environ.get("TRITON_INTERPRET") != "1":
        missing["interpreted"] = "test_interpreter.py starts it"
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    for item in items:
        for mark in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[mark]))


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_is_not_collected():
    """Leave loaded libraries out of collections, which take 0.3 s with them, ten times a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped tokenizer, not to be changed."""
    from transformers import AutoTokenizer

    from flexmask.demo import TOKENIZER_PATH

    return AutoTokenizer.from_pretrained(TOKENIZER_PATH)
