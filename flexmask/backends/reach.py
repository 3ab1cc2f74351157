"""How far back a query sees: windows and chunks as one integer per query.

    visible(q, k)  =  k <= q < end[k]  and  position[k] >= floor[q]

A sliding window of w positions is floor = position - w + 1, a chunk of c positions (llama4's local
attention) is floor = the start of the query's own chunk. Both count positions in the sample, not
places in the packed row, so branches of a tree see exactly what they see in a separate sequence.
"""

from __future__ import annotations

from torch import Tensor


def position_floor(
    position_ids: Tensor, window: int | None = None, chunk: int | None = None
) -> Tensor | None:
    """The lowest position that each query sees, int32 like `position_ids`; None for no limit.

    Args:
        position_ids: int [B, L].
        window: a query sees keys less than `window` positions before it, or None.
        chunk: a query sees keys of its own chunk of `chunk` positions, or None.

    >>> import torch
    >>> position_floor(torch.arange(6), window=3).tolist()
    [-2, -1, 0, 1, 2, 3]
    >>> position_floor(torch.arange(6), chunk=4).tolist()
    [0, 0, 0, 0, 4, 4]
    """
    floors = []
    if window is not None:
        floors.append(position_ids - (window - 1))
    if chunk is not None:
        floors.append(position_ids - position_ids % chunk)
    if not floors:
        return None
    floor = floors[0] if len(floors) == 1 else floors[0].maximum(floors[1])
    return floor.int()
