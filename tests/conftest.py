"""Settings and fixtures that tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("flexmask", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("flexmask")


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped tokenizer, not to be changed."""
    from transformers import AutoTokenizer

    from flexmask.demo import TOKENIZER_PATH

    return AutoTokenizer.from_pretrained(TOKENIZER_PATH)
