"""The drop-in for Hugging Face models."""

from flexmask.model.adapter import disabled, is_patched, patch, unpatch

__all__ = ["disabled", "is_patched", "patch", "unpatch"]
