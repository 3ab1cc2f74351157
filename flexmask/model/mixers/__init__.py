"""Recurrent and convolutional layers of patched models, exact on a tree."""
