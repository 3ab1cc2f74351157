"""What a recurrent or convolutional layer needs to know of a tree, from `subtree_end` alone.

    chain    a run of tokens, each the parent of the next, from a fork (or a root) to a leaf
    piece    part of a chain between two attach points: it is entered at its head and left at its
             tail only, so its tail is where a recurrent state is handed to every piece below
    path     root to leaf: what N-pass runs

Tokens are counted through all rows of a batch, row after row: the batch is one forest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexmask.tree.chains import chain_starts
from flexmask.tree.intervals import find_parents


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of a batch of T tokens; arrays are int64.

    Attributes:
        parents: the token before each token on its path, -1 at a root, [T].
        chains: the first token of each chain, ascending.
        starts, lengths: of the pieces, ascending.
        piece_parents: the piece above each piece, -1 at a root.
    """

    parents: np.ndarray
    chains: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    piece_parents: np.ndarray

    @property
    def is_inner(self) -> np.ndarray:
        """Bool, by piece: whether another piece hangs below it."""
        inner = np.zeros(self.starts.size, bool)
        inner[self.piece_parents[self.piece_parents >= 0]] = True
        return inner

    @property
    def levels(self) -> np.ndarray:
        """The number of pieces above each piece."""
        levels = np.zeros(self.starts.size, np.int64)
        for piece, parent in enumerate(self.piece_parents.tolist()):
            if parent >= 0:
                levels[piece] = levels[parent] + 1
        return levels

    def paths(self) -> list[np.ndarray]:
        """The tokens of each path from a root to a leaf, in the order of the leaves."""
        above = self.piece_parents.tolist()
        runs = [np.arange(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)]
        paths = []
        for leaf in np.flatnonzero(~self.is_inner).tolist():
            path, piece = [], leaf
            while piece >= 0:
                path.append(runs[piece])
                piece = above[piece]
            paths.append(np.concatenate(path[::-1]))
        return paths

    def chains_after_ancestors(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        """All chains end to end, each after the `num` tokens before its head on its path.

        Returns:
            The tokens in that order, -1 where a path begins, [T + num * chains]; and the place
            of each token in it, [T].
        """
        before = np.empty((self.chains.size, num), np.int64)
        ancestor = self.chains
        for column in reversed(range(num)):
            ancestor = np.where(ancestor >= 0, self.parents[ancestor], -1)
            before[:, column] = ancestor
        chain_of = np.searchsorted(self.chains, np.arange(self.parents.size), side="right")
        places = np.arange(self.parents.size) + num * chain_of
        tokens = np.empty(self.parents.size + before.size, np.int64)
        tokens[places] = np.arange(self.parents.size)
        tokens[places[self.chains][:, None] + np.arange(-num, 0)] = before
        return tokens, places


def find_forest(subtree_end: np.ndarray) -> Forest:
    """The trees of a batch with subtree ends [B, L], in time linear in tokens."""
    num_rows, length = subtree_end.shape
    offsets = np.arange(num_rows, dtype=np.int64)[:, None] * length
    end = (subtree_end.astype(np.int64) + offsets).ravel()
    chains = chain_starts(end)
    parents = find_parents(end)
    attached = parents[chains]
    cuts = attached[attached >= 0] + 1  # a fork; its chain may end there
    starts = np.unique(np.concatenate((chains, cuts[cuts < end.size])))
    lengths = np.diff(starts, append=end.size)
    above = parents[starts]
    piece_parents = np.where(above >= 0, np.searchsorted(starts, above, side="right") - 1, -1)
    return Forest(parents, chains, starts, lengths, piece_parents)
