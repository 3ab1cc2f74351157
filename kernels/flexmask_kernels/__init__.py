"""Triton kernels for attention under an interval mask; tensors in, tensors out."""
