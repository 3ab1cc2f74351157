"""The mask-spec compiler: trees, with or without tokens, to a mask that every backend takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from flexmask.errors import MaskError
from flexmask.layout import lay_out
from flexmask.mask.tree_mask import TreeMask
from flexmask.tree import PrefixTree


def compile_mask(trees: PrefixTree | Iterable[PrefixTree]) -> TreeMask:
    """The mask of one packed row that holds `trees` one after the other, each heavy-first.

    Args:
        trees: a tree or several; lengths are enough, tokens are not looked at.

    Returns:
        A TreeMask of one row, with position ids, on the CPU.

    Raises:
        MaskError: no trees.

    >>> from flexmask import PrefixTree
    >>> compile_mask(PrefixTree.from_turns([(60, 300, 120)] * 8))
    TreeMask(rows=1, tokens=4680, visible=6,202,740)
    """
    listed = [trees] if isinstance(trees, PrefixTree) else list(trees)
    if not listed:
        raise MaskError("compile_mask needs at least one tree, got none")
    layouts = [lay_out(tree) for tree in listed]
    sizes = np.array([layout.subtree_end.size for layout in layouts])
    offsets = np.repeat(np.cumsum(sizes) - sizes, sizes)
    subtree_end = np.concatenate([layout.subtree_end for layout in layouts]) + offsets
    position_ids = np.concatenate([layout.position_ids for layout in layouts])
    return TreeMask(subtree_end.astype(np.int32), position_ids.astype(np.int32))
