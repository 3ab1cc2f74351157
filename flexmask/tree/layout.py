"""A tree laid out in a row: depth-first, the child with the largest subtree first.

    order          trunk ------------------------> | branch of a late turn | ... | of an early turn
    subtree_end    of each token: one past the last of its descendants
    position_ids   of each token: its depth

The heavy child comes first, so the history of a conversation becomes one contiguous causal run, and
no token has more than O(log L) runs of ancestors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flexmask.tree.tree import PrefixTree, one_or_more_trees

IGNORE_INDEX = -100  # the label of a position that predicts no trained token


@dataclass(frozen=True, eq=False)
class Layout:
    """The packed order of one tree of L tokens; arrays are int64 [num_segments].

    Attributes:
        order: segments in packed order.
        starts: packed position of each segment's first token, by segment.
        lengths, ends, depths: of the segments in packed order: number of tokens, one past the last
            descendant, and position of the first token.
    """

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    depths: np.ndarray

    @property
    def subtree_end(self) -> np.ndarray:
        """One past the last descendant of each packed token, int32 [L]."""
        return np.repeat(self.ends.astype(np.int32), self.lengths)

    @property
    def position_ids(self) -> np.ndarray:
        """Depth of each packed token, int64 [L]."""
        packed_starts = np.cumsum(self.lengths) - self.lengths
        depth_from_index = np.repeat(self.depths - packed_starts, self.lengths)
        return np.arange(depth_from_index.size) + depth_from_index


def lay_out(tree: PrefixTree) -> Layout:
    """The heavy-first layout of `tree`, in time linear in segments."""
    sizes = _subtree_sizes(tree)
    order = np.array(_heavy_first(tree, sizes), np.int64)
    lengths = tree.lengths[order]
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(lengths) - lengths
    return Layout(order, starts, lengths, (starts + sizes)[order], tree.depths[order])


def concatenate(layouts: Sequence[Layout]) -> Layout:
    """The layout of a row that holds several trees, one after the other."""
    sizes = np.array([layout.lengths.sum() for layout in layouts])
    counts = [layout.order.size for layout in layouts]
    token_offset = np.repeat(np.cumsum(sizes) - sizes, counts)
    segment_offset = np.repeat(np.cumsum(counts) - counts, counts)
    order, starts, lengths, ends, depths = (
        np.concatenate([getattr(layout, name) for layout in layouts])
        for name in ("order", "starts", "lengths", "ends", "depths")
    )
    return Layout(
        order + segment_offset, starts + token_offset, lengths, ends + token_offset, depths
    )


def packed_index(trees: PrefixTree | Iterable[PrefixTree]) -> np.ndarray:
    """Where each token of `trees` stands in the row of `compile_mask(trees)`, int64 [L].

    The tokens count tree after tree, and in each segment after segment, in the order in which its
    `segments` are listed. So `row[index] = tokens` lays them out, and `values[index]` brings what
    was computed in the row back into this order.

    Args:
        trees: a tree or several; lengths are enough.

    Raises:
        MaskError: no trees, or something else.

    >>> from flexmask import PrefixTree, Segment
    >>> segments = [Segment(2), Segment(1, parent=0), Segment(3, parent=0)]  # the last is heaviest
    >>> packed_index(PrefixTree.from_segments(segments)).tolist()
    [0, 1, 5, 2, 3, 4]
    """
    listed = one_or_more_trees(trees, "packed_index")
    stops = np.cumsum([tree.num_tokens for tree in listed])
    return np.concatenate(
        [
            token_index(tree, lay_out(tree)) + stop - tree.num_tokens
            for tree, stop in zip(listed, stops.tolist(), strict=True)
        ]
    )


def token_index(tree: PrefixTree, layout: Layout) -> np.ndarray:
    """The packed position of each token of `tree`, int64 [L], in the tree's own token order."""
    lengths = tree.lengths
    shift = layout.starts - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(shift, lengths)


def shifted_targets(tree: PrefixTree, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """What each packed position predicts: (shift_labels int64 [L], loss_weights float64 [L]).

    The target of a position is the trained token that follows it in its sample; positions without
    one have the label IGNORE_INDEX and the weight 0.
    """
    if tree.input_ids is None or tree.loss_weights is None:
        raise AssertionError("a tree without tokens has no targets")
    packed = token_index(tree, layout)
    before = packed - 1  # inside a segment, the token before is the one that predicts
    heads = np.cumsum(tree.lengths) - tree.lengths
    for index, segment in enumerate(tree.segments):
        if segment.parent is not None:
            end_of_parent = layout.starts[segment.parent] + tree.lengths[segment.parent] - 1
            before[heads[index]] = end_of_parent
    trained = np.flatnonzero(tree.loss_weights)
    labels = np.full(packed.size, IGNORE_INDEX, np.int64)
    weights = np.zeros(packed.size)
    labels[before[trained]] = tree.input_ids[trained]
    np.add.at(weights, before[trained], tree.loss_weights[trained])
    return labels, weights


def _subtree_sizes(tree: PrefixTree) -> np.ndarray:
    """Tokens in the subtree of each segment, itself included."""
    sizes = tree.lengths.tolist()
    for index in range(len(sizes) - 1, -1, -1):
        parent = tree.segments[index].parent
        if parent is not None:
            sizes[parent] += sizes[index]
    return np.array(sizes, np.int64)


def _heavy_first(tree: PrefixTree, sizes: np.ndarray) -> list[int]:
    """The segments in preorder, heaviest child first; equals keep the tree's order."""
    size_of = sizes.tolist()
    children: list[list[int]] = [[] for _ in tree.segments]
    roots: list[int] = []
    for index, segment in enumerate(tree.segments):
        (roots if segment.parent is None else children[segment.parent]).append(index)
    order = []
    stack = roots[::-1]
    while stack:
        index = stack.pop()
        order.append(index)
        heavy_first = sorted(children[index], key=size_of.__getitem__, reverse=True)
        stack.extend(reversed(heavy_first))
    return order
