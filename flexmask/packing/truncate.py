"""A tree whose samples are no longer than a row: each keeps its first tokens.

The end of a sample is cut, as TRL's `truncation_mode="keep_start"` does, and what is left of it has
the loss weights that it had.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flexmask.tree.tree import PrefixTree, Segment


def truncate_tree(tree: PrefixTree, max_tokens: int) -> tuple[PrefixTree, set[int]]:
    """The tree of the first `max_tokens` tokens of each sample, and the samples that are lost.

    Returns:
        The tree, with all samples in their order; and those that were cut and train nothing any
        more, as indices into its leaves.
    """
    lengths = np.minimum(tree.lengths, max_tokens - tree.depths)
    new = (np.cumsum(lengths > 0) - 1).tolist()
    segments = tuple(
        Segment(length, None if old.parent is None else new[old.parent], old.kind)
        for old, length in zip(tree.segments, lengths.tolist(), strict=True)
        if length > 0
    )
    leaves, lost = [], set()
    for index, leaf in enumerate(tree.leaves):
        end = max(s for s in tree.path(leaf.segment) if lengths[s] > 0)
        weights, excess = leaf.weights, tree.sample_length(leaf) - max_tokens
        if weights is not None and excess > 0:
            weights = weights[: max(weights.size - excess, 0)]
            if not weights.any():
                lost.add(index)
        leaves.append(replace(leaf, segment=new[end], weights=weights))
    ids = tree.input_ids
    if ids is not None:
        depths = np.arange(ids.size) + np.repeat(tree.depths - tree.token_starts, tree.lengths)
        ids = ids[depths < max_tokens]
    return PrefixTree(segments, tuple(leaves), ids), lost
