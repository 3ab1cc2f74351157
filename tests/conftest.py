"""Settings that every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("flexmask", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("flexmask")
