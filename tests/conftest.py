"""Settings and fixtures that tests share."""

import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
if find_spec("hypothesis") is not None:  # which the tests for a GPU do without
    from hypothesis import settings

    settings.register_profile("flexmask", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("flexmask")


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped tokenizer, not to be changed."""
    from transformers import AutoTokenizer

    from flexmask.demo import TOKENIZER_PATH

    return AutoTokenizer.from_pretrained(TOKENIZER_PATH)
