"""A training run from files: conversations in, a fine-tuned model out, on the HF Trainer."""

from flexmask.train.config import TrainConfig as TrainConfig
from flexmask.train.run import train as train
