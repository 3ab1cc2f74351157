"""Masks of prefix trees: one integer per token, and everything that follows from it."""

from flexmask.mask.compiler import compile_mask
from flexmask.mask.slices import Slice
from flexmask.mask.tiles import TileRanges
from flexmask.mask.tree_mask import TreeMask

__all__ = ["Slice", "TileRanges", "TreeMask", "compile_mask"]
