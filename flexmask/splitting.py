"""A tree that is larger than a row, cut into trees that are not.

Each piece holds whole samples and therefore all the history that they need. History that several
pieces hold is computed in each of them, but trained only in the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexmask.layout import lay_out
from flexmask.tree import Leaf, PrefixTree, Segment


def split_tree(tree: PrefixTree, max_tokens: int) -> tuple[list[PrefixTree], list[Leaf]]:
    """Pieces of `tree` of at most `max_tokens` tokens, and the samples that fit in none.

    Samples are taken in packed order, where neighbours share most history, and a piece is closed
    when the next sample would overflow it.
    """
    starts = lay_out(tree).starts
    groups: list[list[int]] = []
    too_long: list[Leaf] = []
    held: set[int] = set()
    num_tokens = 0
    for index in sorted(range(len(tree.leaves)), key=lambda i: starts[tree.leaves[i].segment]):
        leaf = tree.leaves[index]
        path = tree.path(leaf.segment)
        if tree.sample_length(leaf) > max_tokens:
            too_long.append(leaf)
            continue
        added = int(tree.lengths[[s for s in path if s not in held]].sum())
        if not groups or num_tokens + added > max_tokens:
            groups.append([])
            held, num_tokens = set(), 0
            added = tree.sample_length(leaf)
        groups[-1].append(index)
        held.update(path)
        num_tokens += added
    trained: set[int] = set()
    return [_restrict(tree, sorted(group), trained) for group in groups], too_long


def _restrict(tree: PrefixTree, leaves: Sequence[int], trained: set[int]) -> PrefixTree:
    """The part of `tree` that the given leaves need; `trained` segments carry no loss again."""
    kept = sorted({s for leaf in leaves for s in tree.path(tree.leaves[leaf].segment)})
    renamed: dict[int | None, int | None] = {None: None}
    renamed.update((old, new) for new, old in enumerate(kept))
    segments = tuple(
        Segment(tree.segments[s].length, renamed[tree.segments[s].parent], tree.segments[s].kind)
        for s in kept
    )
    ends = tuple(
        Leaf(kept.index(tree.leaves[leaf].segment), tree.leaves[leaf].key) for leaf in leaves
    )
    if tree.input_ids is None or tree.loss_weights is None:
        return PrefixTree(segments, ends)
    heads = np.cumsum(tree.lengths) - tree.lengths
    tokens = [np.arange(heads[s], heads[s] + tree.lengths[s]) for s in kept]
    weights = [
        tree.loss_weights[index] * (s not in trained) for s, index in zip(kept, tokens, strict=True)
    ]
    trained.update(kept)
    return PrefixTree(
        segments, ends, tree.input_ids[np.concatenate(tokens)], np.concatenate(weights)
    )
