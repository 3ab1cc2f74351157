"""The drop-in for Hugging Face models."""

from flexmask.model.adapter import disabled, patch, unpatch

__all__ = ["disabled", "patch", "unpatch"]
