"""The oracle of all masks: from a tree to a dense matrix, up the parent links.

It shares nothing with the fast path except the order of the tokens: subtree ends are not looked at.
"""

from __future__ import annotations

import numpy as np

from flexmask.tree.layout import packed_index
from flexmask.tree.tree import PrefixTree


def ancestry(tree: PrefixTree) -> np.ndarray:
    """Bool [L, L] in packed order: True where the key is an ancestor of the query, or itself."""
    packed = packed_index(tree)
    heads = np.cumsum(tree.lengths) - tree.lengths
    dense = np.zeros((tree.num_tokens, tree.num_tokens), bool)
    for index, segment in enumerate(tree.segments):
        for offset in range(segment.length):
            query = packed[heads[index] + offset]
            if offset:
                before = packed[heads[index] + offset - 1]
                dense[query] = dense[before]
            elif segment.parent is not None:
                last_of_parent = heads[segment.parent] + tree.segments[segment.parent].length - 1
                dense[query] = dense[packed[last_of_parent]]
            dense[query, query] = True
    return dense
