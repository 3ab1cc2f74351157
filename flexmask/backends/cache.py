"""What is made of a mask once for all layers of a model, and forgotten with the mask.

The layers of a model call attention one by one, each with views of the same mask. What they need of
it beside the mask itself (position floors, block tables) depends on nothing else, so it is kept for
as long as the mask's memory lives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_KEPT = 8  # things of one mask: a model has one or two kinds of layers, and a few for each

T = TypeVar("T")

# by storage: of the first tensor, and what was made of views of it
_cache: dict[StorageWeakRef, dict[Hashable, Any]] = {}


def derived(make: Callable[..., T], *tensors: Tensor, key: Hashable = None) -> T:
    """`make(*tensors)`, called once for the same tensors and views of the same memory.

    Tensors are told apart by storage, version and place in it, not by their values: writing to one
    makes it a new one. Where writing might go unnoticed nothing is kept: inside `torch.compile`,
    while a CUDA graph is captured, for inference tensors, and for memory of other libraries.

    Args:
        make: a function of the tensors alone; what it returns must not share their memory.
        *tensors: at least one; the first says how long the result is kept.
        key: tells apart what different functions make of the same tensors.
    """
    if torch.compiler.is_compiling() or not all(map(_shows_writes, tensors)):
        return make(*tensors)
    storage = StorageWeakRef(tensors[0].untyped_storage())
    if storage not in _cache:
        for dead in [other for other in _cache if other.expired()]:
            del _cache[dead]
        _cache[storage] = {}
    known = _cache[storage]
    place = (key, *map(_identity, tensors))
    if place not in known:
        if len(known) == _KEPT:
            del known[next(iter(known))]
        with torch.inference_mode(False):  # the next to ask may want gradients
            known[place] = make(*tensors)
    return known[place]


def _shows_writes(x: Tensor) -> bool:
    """Whether every write to a tensor changes its version."""
    if x.is_inference() or not x.untyped_storage().resizable():  # the latter: NumPy's, say
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _identity(x: Tensor) -> Hashable:
    """What two views of the same values have in common, and no others.

    The reference keeps the storage's address from being used again, not its memory.
    """
    storage = StorageWeakRef(x.untyped_storage())
    return storage, x._version, x.dtype, x.storage_offset(), x.shape, x.stride()
