"""Recurrent and convolutional layers of patched models, exact on a tree."""

from flexmask.model.mixers.forward import MixerForward
from flexmask.model.mixers.kinds import MIXERS, find_mixers

__all__ = ["MIXERS", "MixerForward", "find_mixers"]
