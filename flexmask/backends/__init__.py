"""Exact attention over tree masks: one function, several backends."""

from flexmask.backends.api import attention
from flexmask.backends.choice import BackendChoice, choose_backend

__all__ = ["BackendChoice", "attention", "choose_backend"]
