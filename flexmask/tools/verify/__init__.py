"""Proof that single-pass equals N-pass on a user's own model and data."""
