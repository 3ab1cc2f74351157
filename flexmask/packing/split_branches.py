"""What has to be grouped when a tree is cut: the ends of its samples, in packed order.

A group of samples costs the union of their paths. Of samples whose end lies on the path of another
only the longest counts, since the others come with it for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexmask.tree.layout import lay_out
from flexmask.tree.tree import PrefixTree


@dataclass(frozen=True, eq=False, slots=True)
class Branches:
    """The N paths that have to be grouped, all at most `max_tokens` long.

    Heavy-first order takes the longest history first and the branches that leave it after that,
    deepest first. Lists have one entry per path, in that order.

    Attributes:
        max_tokens: budget of a group.
        ends: last segment of each path.
        lengths: tokens of the path.
        shared: tokens that it shares with the path before it; 0 for the first.
        history: tokens that it shares with the trunk, the first path of its root; not increasing
            along the paths of a tree with one root.
        masks: its segments as a bit set.
        depths: tokens up to and with each of its segments, after a 0.
    """

    max_tokens: int
    ends: list[int]
    lengths: list[int]
    shared: list[int]
    history: list[int]
    masks: list[int]
    depths: list[list[int]]

    def __len__(self) -> int:
        return len(self.ends)

    def added(self, index: int, mask: int) -> int:
        """Tokens that path `index` adds to a group that holds the segments of `mask`."""
        return self.lengths[index] - self.depths[index][(self.masks[index] & mask).bit_count()]

    def num_tokens(self, group: Iterable[int]) -> int:
        """Tokens of the union of the paths in `group`."""
        total = mask = 0
        for index in group:
            total += self.added(index, mask)
            mask |= self.masks[index]
        return total

    def subset(self, indices: Sequence[int]) -> Branches:
        """The problem of grouping only these paths, given in ascending order."""
        trunk = self.masks[indices[0]]
        before = [0, *(self.masks[i] for i in indices[:-1])]
        return Branches(
            self.max_tokens,
            [self.ends[i] for i in indices],
            [self.lengths[i] for i in indices],
            [self.lengths[i] - self.added(i, m) for i, m in zip(indices, before, strict=True)],
            [self.lengths[i] - self.added(i, trunk) for i in indices],
            [self.masks[i] for i in indices],
            [self.depths[i] for i in indices],
        )


def branches_of(tree: PrefixTree, leaves: Iterable[int], max_tokens: int) -> Branches:
    """The paths that the samples `leaves` of `tree` need; each must fit the budget."""
    starts = lay_out(tree).starts
    segments = {tree.leaves[leaf].segment for leaf in leaves}
    inner = {s for end in segments for s in tree.path(end)[:-1]}
    ends = sorted(segments - inner, key=lambda s: int(starts[s]))
    depth_of = (tree.depths + tree.lengths).tolist()
    paths = [tree.path(end) for end in ends]
    masks = [sum(1 << s for s in path) for path in paths]
    depths = [[0, *(depth_of[s] for s in path)] for path in paths]
    unknown = [0] * len(ends)
    whole = Branches(max_tokens, ends, [depth_of[s] for s in ends], unknown, unknown, masks, depths)
    return whole.subset(range(len(ends)))
