"""The mask-spec compiler: trees, with or without tokens, to a mask that every backend takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from flexmask.errors import MaskError
from flexmask.tree.layout import concatenate, lay_out
from flexmask.tree.mask import TreeMask
from flexmask.tree.tree import PrefixTree, check_trees


def compile_mask(trees: PrefixTree | Iterable[PrefixTree]) -> TreeMask:
    """The mask of one packed row that holds `trees` one after the other, each heavy-first.

    Args:
        trees: a tree or several; lengths are enough, tokens are not looked at.

    Returns:
        A TreeMask of one row, with position ids, on the CPU.

    Raises:
        MaskError: no trees, or something else.

    >>> from flexmask import PrefixTree
    >>> compile_mask(PrefixTree.from_turns([(60, 300, 120)] * 8))
    TreeMask(rows=1, tokens=4680, visible=3,897,540)
    """
    listed = [trees] if isinstance(trees, PrefixTree) else check_trees(trees, "compile_mask")
    if not listed:
        raise MaskError("compile_mask needs at least one tree, got none")
    layout = concatenate([lay_out(tree) for tree in listed])
    return TreeMask(
        torch.from_numpy(layout.subtree_end),
        torch.from_numpy(layout.position_ids.astype(np.int32)),
    )
