"""The plan of a tree batch: which tokens go through a layer together, on the layer's device.

It depends on the tree alone, so it is made once for all layers and for a recomputation during the
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexmask.backends.cache import per_mask_cache
from flexmask.errors import UnsupportedModelError
from flexmask.model.mixers.forest import Forest, find_forest

MAX_PADDING = 1 / 8  # of the tokens of a group


class Group(NamedTuple):
    """Runs of tokens that go through a layer as one batch, padded to the longest.

    Attributes:
        tokens: int64 [n, longest], a run a line; any token where a run has ended.
        is_token: bool [n, longest], False where a run has ended; None if none has.
        members: the runs by number.
    """

    tokens: Tensor
    is_token: Tensor | None
    members: list[int]

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, without padding."""
        return self.tokens.numel() if self.is_token is None else int(self.is_token.sum())


class Batches(NamedTuple):
    """All tokens of a forest, in groups that are run one after the other.

    Attributes:
        groups: the batches.
        places: where each token stands in the outputs of all groups, put end to end, int64 [T].
    """

    groups: list[Group]
    places: Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens go through a layer."""
        return sum(group.num_tokens for group in self.groups)

    @property
    def num_padded(self) -> int:
        """The same with padding."""
        return sum(group.tokens.numel() for group in self.groups)


class Plan:
    """How the tokens of a batch with subtree ends int [B, L] go through its layers."""

    def __init__(self, subtree_end: Tensor) -> None:
        self.device = subtree_end.device
        self.forest: Forest = find_forest(subtree_end.cpu().numpy())

    @cached_property
    def pieces(self) -> Batches:
        """Every token once: inner pieces level by level, then all leaves at once."""
        forest = self.forest
        starts, lengths = forest.starts, forest.lengths
        runs = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        is_root = forest.piece_parents < 0
        step = np.where(forest.is_inner, forest.levels, starts.size)
        order = np.lexsort((lengths, is_root, step))
        return self._batches(runs, order, np.stack((step, is_root), axis=1))

    @cached_property
    def paths(self) -> Batches:
        """Every path from a root to a leaf, as N-pass runs it; its values count once a token."""
        runs = self.forest.paths()
        order = np.argsort([run.size for run in runs], kind="stable")
        return self._batches(runs, order, np.zeros((len(runs), 1)), at_least=2)

    def chains(self, num_ancestors: int) -> tuple[Tensor, Tensor, Tensor]:
        """All chains end to end, each after its ancestors; see `Forest.chains_after_ancestors`.

        Returns:
            The tokens, with 0 in place of -1; where that was, int64; and the place of each token.
        """
        tokens, places = self.forest.chains_after_ancestors(num_ancestors)
        absent = np.flatnonzero(tokens < 0)
        return self._tensor(tokens.clip(0)), self._tensor(absent), self._tensor(places)

    def _batches(
        self, runs: list[np.ndarray], order: np.ndarray, keys: np.ndarray, at_least: int = 1
    ) -> Batches:
        """Groups of the `runs`, taken in `order`: those of one key and of like length.

        Args:
            runs: tokens of each run.
            order: the runs in the order in which they are run.
            keys: what has to be the same in a group, a line for each run.
            at_least: tokens in the lines of a group; layers treat a sequence of one token apart.
        """
        groups, places, offset = [], np.empty(self.forest.parents.size, np.int64), 0
        for members in _alike(runs, order.tolist(), keys):
            tokens, is_token = _pad([runs[member] for member in members], at_least)
            spots = offset + np.arange(tokens.size).reshape(tokens.shape)
            places[tokens[is_token]] = spots[is_token]
            offset += tokens.size
            mask = None if is_token.all() else self._tensor(is_token)
            groups.append(Group(self._tensor(tokens), mask, members))
        return Batches(groups, self._tensor(places))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def plan_of(mask: Tensor) -> Plan:
    """The plan of a tree batch by its mask [B, 1, 2, L]; the same object for the same mask."""
    return per_mask_cache(Plan, mask[:, 0, 0])


def take(tensor: Tensor, tokens: Tensor) -> Tensor:
    """The `tokens` [n, l] of a tensor [T, ...], as [n, l, ...]."""
    return tensor.index_select(0, tokens.flatten()).unflatten(0, tuple(tokens.shape))


def put_back(outputs: Sequence[Tensor], batches: Batches) -> Tensor:
    """The values of each token [T, ...] out of those of all groups, [n, l, ...] each."""
    for output, group in zip(outputs, batches.groups, strict=True):
        if output.shape[:2] != group.tokens.shape:
            raise UnsupportedModelError(
                f"{list(group.tokens.shape)} tokens went through a layer, and {list(output.shape)} "
                "values came out; it does not map sequences to sequences"
            )
    return torch.cat([out.flatten(0, 1) for out in outputs]).index_select(0, batches.places)


def _alike(runs: list[np.ndarray], order: list[int], keys: np.ndarray) -> list[list[int]]:
    """`order`, cut where the key changes or padding would pass MAX_PADDING."""
    parts: list[list[int]] = []
    for run in order:
        last = parts[-1] if parts else []
        if last and (keys[run] == keys[last[0]]).all():
            total = sum(runs[member].size for member in last) + runs[run].size
            if total >= (1 - MAX_PADDING) * runs[run].size * (len(last) + 1):
                last.append(run)
                continue
        parts.append([run])
    return parts


def _pad(runs: list[np.ndarray], at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs as lines of one array, ended by copies of their own first token; and which are none."""
    longest = max(at_least, *(run.size for run in runs))
    lines = [np.pad(run, (0, longest - run.size), constant_values=run[0]) for run in runs]
    sizes = np.array([run.size for run in runs])
    return np.stack(lines), np.arange(longest) < sizes[:, None]
