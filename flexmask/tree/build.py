"""Samples merged into a prefix tree.

Two samples share a node as long as they agree on every token from the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexmask.errors import DataError
from flexmask.tree.sample import Sample, common_prefix_length
from flexmask.tree.tree import Leaf, PrefixTree, Segment


def build_tree(samples: Sequence[Sample]) -> PrefixTree:
    """The prefix tree of `samples`, in time linear in their tokens.

    Where two samples train different tokens after the same one, that one token is held once for
    each of them, so that every node has a single target.

    Raises:
        DataError: no samples, or something else.
    """
    if isinstance(samples, Sample):
        raise DataError("build_tree takes a list of Sample, got Sample")
    if not samples:
        raise DataError("a tree needs at least one sample, got none")
    for index, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise DataError(
                f"sample {index}: must be a Sample(input_ids, loss_weights), got "
                f"{type(sample).__name__}"
            )
    root = _Run(np.empty(0, np.int64), np.empty(0, bool))
    for index, sample in enumerate(samples):
        _insert(root, sample, index)
    _separate_targets(root)
    return _freeze(root, samples)


class _Run:
    """A segment under construction; the root stands before the first token and is empty."""

    __slots__ = ("children", "children_by_token", "ids", "samples", "trained")

    def __init__(self, ids: np.ndarray, trained: np.ndarray) -> None:
        self.ids = ids
        self.trained = trained  # bool: whether a sample trains the token
        self.children: list[_Run] = []
        self.children_by_token: dict[int, _Run] = {}  # by first token, while samples are inserted
        self.samples: list[int] = []  # samples that end with the last token of this run

    def cut(self, length: int) -> _Run:
        """Keep the first `length` tokens and return the others, now the only child."""
        tail = _Run(self.ids[length:], self.trained[length:])
        tail.children, tail.samples = self.children, self.samples
        tail.children_by_token = self.children_by_token
        self.ids, self.trained = self.ids[:length], self.trained[:length]
        self.children, self.children_by_token, self.samples = [], {}, []
        self.add(tail)
        return tail

    def add(self, child: _Run) -> None:
        self.children.append(child)
        self.children_by_token[int(child.ids[0])] = child

    def prepend(self, ids: np.ndarray, trained: np.ndarray) -> None:
        self.ids = np.concatenate((ids, self.ids))
        self.trained = np.concatenate((trained, self.trained))

    def join_only_child(self) -> None:
        (child,) = self.children
        child.prepend(self.ids, self.trained)
        self.ids, self.trained = child.ids, child.trained
        self.children, self.samples = child.children, child.samples


def _insert(root: _Run, sample: Sample, index: int) -> None:
    """Add one sample below `root`, cutting runs where it leaves them or ends inside them."""
    ids, trained = sample.input_ids, sample.loss_weights > 0
    trained[0] = False  # nothing predicts the first token
    run, at = root, 0
    while at < ids.size:
        child = run.children_by_token.get(int(ids[at]))
        if child is None:
            child = _Run(ids[at:], trained[at:])
            run.add(child)
        else:
            shared = common_prefix_length(child.ids, ids[at:])
            if shared < child.ids.size:
                child.cut(shared)
            child.trained = child.trained | trained[at : at + shared]
        run, at = child, at + child.ids.size
    run.samples.append(index)


def _separate_targets(root: _Run) -> None:
    """Fork one token early wherever several children of a run begin with a trained token.

    The copies of the shared token ask for no fork before them: they are one target.
    """
    stack = [(child, root) for child in root.children]
    while stack:
        run, parent = stack.pop()
        trained = [child for child in run.children if child.trained[0]]
        if len(trained) > 1:
            if run.ids.size > 1:
                parent, run = run, run.cut(run.ids.size - 1)
            first, *others = trained
            run.children = [c for c in run.children if c is first or not c.trained[0]]
            for child in others:
                child.prepend(run.ids, np.zeros(1, bool))
                parent.children.append(child)
                stack.append((child, parent))
            if len(run.children) == 1 and not run.samples:
                run.join_only_child()
                stack.append((run, parent))
                continue
        stack.extend((child, run) for child in run.children)


def _freeze(root: _Run, samples: Sequence[Sample]) -> PrefixTree:
    """The finished tree: runs in preorder, tokens end to end."""
    segments: list[Segment] = []
    runs: list[_Run] = []
    leaves: list[Leaf | None] = [None] * len(samples)
    stack: list[tuple[_Run, int | None]] = [(child, None) for child in reversed(root.children)]
    while stack:
        run, parent = stack.pop()
        index = len(segments)
        segments.append(Segment(run.ids.size, parent))
        runs.append(run)
        for sample in run.samples:
            leaves[sample] = Leaf(index, samples[sample].key, _last_weights(samples[sample]))
        stack.extend((child, index) for child in reversed(run.children))
    return PrefixTree(
        tuple(segments),
        tuple(leaf for leaf in leaves if leaf is not None),
        np.concatenate([run.ids for run in runs]),
    )


def _last_weights(sample: Sample) -> np.ndarray:
    """The weights of `sample` from its first target on."""
    targets = np.flatnonzero(sample.loss_weights[1:])
    first = int(targets[0]) + 1 if targets.size else len(sample)
    return sample.loss_weights[first:].copy()  # a view would keep the weights of its context
