"""The configurations that are worth a measurement, and the rows to measure them on."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from flexmask_kernels.configs import BY_KEY, Config, capability_of
from flexmask_kernels.tuning import choose_config

# (queries, keys) of a tile up to D = 128, and beyond it
_BY_QUERY = ((128, 64), (128, 128), (64, 64), (64, 128), (128, 32))
_BY_KEY = ((64, 128), (64, 64), (128, 64), (32, 64), (32, 128))
_WIDE = ((64, 64), (64, 32), (32, 64), (128, 32), (16, 64))


def candidates(kernel: str, q: Tensor, v: Tensor) -> list[Config]:
    """The configurations worth a try: the current one first, then its neighbours.

    A program owns 64 or 128 rows of its sums, queries or keys. Four warps are a warpgroup, which
    multiplies 64 rows at a time: two programs of one run beside each other on a multiprocessor, so
    that one multiplies while the other takes exponents. More stages hide more latency and take
    shared memory. At D = 256 a block of 64 keys spills some registers in the backward kernels, but
    reaches Hopper's wgmma: only a measurement can weigh the two. So it is with TMA. A tile that is
    too small for its warps (`repeats_work`) is no candidate.
    """
    width = max(q.shape[3], v.shape[3])
    is_by_query = kernel in ("forward", "backward_queries")
    if width > 128:
        options = list(product(_WIDE, (8, 4), (2, 1)))
    else:
        tiles = _BY_QUERY if is_by_query else _BY_KEY
        stages = (2, 3, 4) if is_by_query and width > 64 else (2, 3)
        options = [
            (tile, warps, number)
            for tile, warps, number in product(tiles, (8, 4), stages)
            # 128 rows of sums do not fit in the registers of 4 warps
            if not (warps == 4 and width > 64 and tile[0 if is_by_query else 1] == 128)
        ]
    current, capability = choose_config(kernel, q, v), capability_of(q.device)
    others = (Config(*tile, warps, stages) for tile, warps, stages in options)
    others = (config for config in others if not repeats_work(kernel, config, capability, width))
    found = [current, *others]
    if capability >= 90:
        with_tma = [config._replace(use_tma=True) for config in found]
        found = [current, with_tma[0], *found[1:], *with_tma[1:]]
    return list(dict.fromkeys(found))


def repeats_work(kernel: str, config: Config, capability: int, width: int) -> bool:
    """Whether warps of a program compute the same scores, because the tile is too small for all.

    wgmma gives each warp 16 rows of what the program owns. Below 64 rows, and on other chips than
    Hopper and Blackwell, so does mma if there are at least as many rows as sums have columns; else
    it gives each warp 8 of the tokens that are walked, as the sum of dq in `backward_fused` asks in
    any case. Blackwell's products of 64 rows and more repeat nothing. [counted in machine code]
    """
    owned, walked = config.block_q, config.block_k
    if kernel in BY_KEY:
        owned, walked = walked, owned
    if owned >= 64 and 90 <= capability < 120:
        return capability < 100 and owned < 16 * config.num_warps
    by_rows, by_columns = owned < 16 * config.num_warps, walked < 8 * config.num_warps
    if kernel == "backward_fused":
        return by_columns or (owned >= width and by_rows)
    return by_rows if owned >= width else by_columns


def typical_row(num_tokens: int, device: str) -> Tensor:
    """Subtree ends int32 [1, L] of conversations of 8 turns: a trunk and 7 branches each."""
    turn, branch = 180, 420  # tokens; a branch leaves the trunk at the end of each turn but one
    trunk = 8 * turn
    whole = trunk + 7 * branch
    token = torch.arange(num_tokens, device=device)
    start, place = token // whole * whole, token % whole
    # the branch that leaves last comes first: token p is seen by those that leave after it
    of_trunk = trunk + (7 - place // turn) * branch
    of_branch = trunk + ((place - trunk) // branch + 1) * branch
    end = start + torch.where(place < trunk, of_trunk, of_branch)
    return end.clamp(max=num_tokens).to(torch.int32).unsqueeze(0)
