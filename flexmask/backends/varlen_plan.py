"""The plan of the `varlen` backend: a row's visible pairs as sequences of FlashAttention's kernels.

A chain (heavy path) is a contiguous run of queries, each the child of the one before. All that its
queries see is the path from the root to the chain's end, and the i-th query from the end sees all
of it but the last i tokens: a causal mask that is aligned to the bottom right. So one sequence for
each chain, with its path gathered as keys, is the whole mask:

* a window of W positions is the kernel's own, W - 1 keys to the left, since a path is in the order
  of positions; and no more than W - 1 ancestors are gathered;
* a chain is cut where a chunk begins, and its keys begin there too;
* many neighbours that are alone in their trees, as padding is, are one sequence of a call of its
  own, in which a query sees no key to its left.

Keys are gathered group by group, so that what a group holds in memory has a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexmask.backends.cache import per_mask_cache
from flexmask.tree.chains import chain_starts
from flexmask.tree.intervals import find_depths

MAX_SEQUENCES = 65_535  # of one call: the kernels' grid has no more in its second dimension
_MANY_ALONE = 16  # so many tokens that are alone, one after the other, are worth a call


class Group(NamedTuple):
    """One call of the kernel: contiguous queries of the batch's flat rows [B * L], and their keys.

    Attributes:
        rows: the queries.
        keys: int64 index of their keys, sequence by sequence; the same slice as `rows` where each
            sequence is its own keys.
        cu_q: int32 [sequences + 1], where each sequence's queries begin, counted in the group.
        cu_k: the same for its keys.
        max_q: the most queries of a sequence, and at least 2: for one query the kernels change the
            layout of the logsumexp.
        max_k: the most keys of a sequence.
        window_left: how many keys before its own a query sees; -1 for all.
    """

    rows: slice
    keys: slice | Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    window_left: int


class GatherCost(NamedTuple):
    """What `varlen` computes and gathers for a mask: tokens, their sequences, keys and pairs."""

    tokens: int
    sequences: int
    keys: int
    pairs: int

    @property
    def is_gathered(self) -> bool:
        """Whether any sequence has keys outside itself."""
        return self.keys > self.tokens


class _Sequence(NamedTuple):
    start: int
    stop: int
    keys: np.ndarray
    is_alone: bool


def plan_groups(
    subtree_end: Tensor,
    *,
    window: int | None,
    chunk: int | None,
    key_bytes: int,
    sequence_bytes: int,
    budget: int,
) -> list[Group]:
    """The calls that cover each visible pair of a batch exactly once; waits for the device.

    Args:
        subtree_end: int [B, L].
        window: a query sees only keys less than `window` positions before it; None for all.
        chunk: a query sees only keys of its own chunk of `chunk` positions; None for all.
        key_bytes: what a key costs in memory.
        sequence_bytes: what a sequence costs.
        budget: bytes that a group may cost. A single sequence may cost more.
    """
    groups = []
    sequences = per_mask_cache(_sequences, subtree_end, window=window, chunk=chunk)
    for is_alone, run in groupby(sequences, lambda x: x.is_alone):
        left = 0 if is_alone else -1 if window is None else window - 1
        for members in _filled(run, key_bytes, sequence_bytes, budget):
            groups.append(_group(members, left, subtree_end.device))
    return groups


def gather_cost(
    subtree_end: Tensor, *, window: int | None = None, chunk: int | None = None
) -> GatherCost:
    """What the plan of a mask comes to; waits for the device."""
    sequences = per_mask_cache(_sequences, subtree_end, window=window, chunk=chunk)
    keys = pairs = 0
    for start, stop, path, is_alone in sequences:
        queries = stop - start
        keys += path.size
        seen = np.ones(1) if is_alone else np.arange(path.size - queries, path.size) + 1
        pairs += int(np.minimum(seen, window or path.size).sum()) * (queries if is_alone else 1)
    return GatherCost(subtree_end.numel(), len(sequences), keys, pairs)


def _sequences(subtree_end: Tensor, *, window: int | None, chunk: int | None) -> list[_Sequence]:
    """The sequences of all rows in their order; keys are places in the flat batch."""
    length = subtree_end.shape[1]
    return [
        _Sequence(offset + start, offset + stop, offset + keys, is_alone)
        for offset, end in zip(count(0, length), subtree_end.cpu().numpy(), strict=False)
        for start, stop, keys, is_alone in _of_row(end, window, chunk)
    ]


def _of_row(end: np.ndarray, window: int | None, chunk: int | None) -> Iterator[_Sequence]:
    depth = find_depths(end)
    starts = chain_starts(end)
    stops = np.append(starts[1:], end.size)
    is_alone = (depth[starts] == 0) & (stops - starts == 1)
    path = np.empty(int(depth.max()) + 1, np.int64)  # of the chain at hand, by depth
    edges = np.flatnonzero(np.diff(is_alone, prepend=~is_alone[0], append=~is_alone[-1]))
    for low, high in pairwise(edges.tolist()):
        if is_alone[low] and high - low >= _MANY_ALONE:
            run = np.arange(starts[low], stops[high - 1])
            yield _Sequence(int(run[0]), int(run[-1]) + 1, run, True)
            continue
        for start, stop in zip(starts[low:high].tolist(), stops[low:high].tolist(), strict=True):
            first = int(depth[start])
            path[first : first + stop - start] = np.arange(start, stop)
            for a, b in _cut(first, first + stop - start, chunk):
                lowest = 0 if chunk is None else a - a % chunk
                lowest = lowest if window is None else max(lowest, a - (window - 1))
                yield _Sequence(start + a - first, start + b - first, path[lowest:b].copy(), False)


def _cut(low: int, high: int, chunk: int | None) -> Iterable[tuple[int, int]]:
    """The depths [low, high) where chunks begin."""
    if chunk is None:
        return [(low, high)]
    edges = [low, *range(low - low % chunk + chunk, high, chunk), high]
    return pairwise(edges)


def _filled(
    sequences: Iterable[_Sequence], key_bytes: int, sequence_bytes: int, budget: int
) -> Iterator[list[_Sequence]]:
    """Sequences, one group after the other, each within the budget."""
    members: list[_Sequence] = []
    used = 0
    for sequence in sequences:
        cost = sequence.keys.size * key_bytes + sequence_bytes
        if members and (used + cost > budget or len(members) == MAX_SEQUENCES):
            yield members
            members, used = [], 0
        members.append(sequence)
        used += cost
    yield members


def _group(members: list[_Sequence], window_left: int, device: torch.device) -> Group:
    rows = slice(members[0].start, members[-1].stop)
    keys = np.concatenate([x.keys for x in members])
    cu_q = [0, *(x.stop - rows.start for x in members)]
    cu_k = [0, *np.cumsum([x.keys.size for x in members])]
    is_itself = keys.size == rows.stop - rows.start
    return Group(
        rows,
        rows if is_itself else torch.from_numpy(keys).to(device),
        torch.tensor(cu_q, dtype=torch.int32, device=device),
        torch.tensor(cu_k, dtype=torch.int32, device=device),
        max(2, *(x.stop - x.start for x in members)),
        max(x.keys.size for x in members),
        window_left,
    )
