"""A row cut over several devices (context parallelism): what each part sees of the others.

Let a shard hold the packed tokens [start, stop). Its queries see keys of two kinds:

    inside   k in [start, stop): q sees k where k <= q < end[k], so the shard is a forest of its
             own, with ends cut at `stop`
    outside  k < start: only ancestors of the token `start`, because a subtree that reaches into the
             shard holds its first token. Query q sees k where q < end[k]: a prefix of the shard

The ancestors of a token are as many as its position says. So a shard needs `position_ids[start]`
keys from elsewhere, however long the row and the shard are, and two int32 vectors for its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from flexmask.errors import DataError

Division = Literal["contiguous", "zigzag", "balanced"]


class Shard(NamedTuple):
    """The mask of queries [start, stop) of a row; queries are counted from `start`.

    Attributes:
        local_end: int32 [stop - start]; subtree ends of the shard's own tokens, counted likewise.
        remote_keys: int64 [position_ids[start]]; packed positions of the keys outside, ascending.
        remote_end: int32, as many; query q sees remote key i where q < remote_end[i].
    """

    local_end: np.ndarray
    remote_keys: np.ndarray
    remote_end: np.ndarray


def shard_row(end: np.ndarray, start: int, stop: int) -> Shard:
    """The shard [start, stop) of a row with subtree ends `end` [L]."""
    remote = np.flatnonzero(end[:start] > start)
    local = np.minimum(end[start:stop], stop) - start
    return Shard(
        local.astype(np.int32),
        remote,
        (np.minimum(end[remote], stop) - start).astype(np.int32),
    )


def divide_row(
    position_ids: np.ndarray, num_devices: int, block: int, division: Division
) -> list[np.ndarray]:
    """The blocks of `block` tokens that each device holds, in equal numbers.

    "contiguous": neighbours; "zigzag": device i has the i-th part from the front and the i-th from
    the back, which balances a causal row; "balanced": blocks dealt out by falling number of visible
    pairs, forth and back (a query sees as many keys as its position says, and itself).

    Args:
        position_ids: int64 [L], L a multiple of 2 x devices x block.
        num_devices: how many.
        block: tokens that stay together.
        division: one of the three.

    Raises:
        DataError: a length that does not divide, or an unknown division.
    """
    length = position_ids.size
    if length % (2 * num_devices * block):
        raise DataError(
            f"the row must have a multiple of {2 * num_devices * block} tokens (2 x devices x "
            f"block), got {length}; pad it"
        )
    if division not in get_args(Division):
        raise DataError(f"division must be one of {get_args(Division)}, got {division!r}")
    order = np.arange(length // block)
    if division == "contiguous":
        return list(order.reshape(num_devices, -1))
    if division == "zigzag":
        parts = order.reshape(2 * num_devices, -1)
        return [np.concatenate((parts[i], parts[-1 - i])) for i in range(num_devices)]
    heavy_first = np.argsort(-count_pairs(position_ids, block), kind="stable")
    rounds = heavy_first.reshape(-1, num_devices).copy()
    rounds[1::2] = rounds[1::2, ::-1]
    return [np.sort(blocks) for blocks in rounds.T]


def count_pairs(position_ids: np.ndarray, block: int) -> np.ndarray:
    """Visible pairs of the queries of each block, int64; the row is a multiple of it."""
    return (position_ids.reshape(-1, block) + 1).sum(1)


def count_remote(end: np.ndarray, blocks: Sequence[int] | np.ndarray, block: int) -> int:
    """How many keys outside of its own blocks a device has to fetch."""
    needed = np.zeros(end.size, bool)
    index = np.arange(end.size)
    for start in np.asarray(blocks) * block:
        needed |= (index < start) & (end > start)
    for start in np.asarray(blocks) * block:
        needed[start : start + block] = False
    return int(needed.sum())
