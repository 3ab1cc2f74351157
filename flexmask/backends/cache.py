"""The one cache for what follows from a mask: made once for all layers of a model, both ways.

The layers of a model call attention one by one, each with the same mask. What they need of it
beside the mask itself (window starts, tiles, plans) depends on nothing else, so it is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_KEPT = 32  # in all; a model has one or two kinds of layers, and a few things for each

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Place = tuple[Hashable, ...]

_cache: OrderedDict[Place, Any] = OrderedDict()  # the one that was used last stands last


def per_mask_cache(make: Callable[..., T], *tensors: Tensor, **options: Hashable) -> T:
    """`make(*tensors, **options)`, called once for the same tensors and options.

    On a CPU tensors are the same where their values are. Looking at values elsewhere waits for the
    device, so there they are told apart by storage, version and place in it: writing to one makes
    it a new one, and what was made of it goes with its memory. Nothing is kept where writing might
    go unnoticed: for inference tensors, while a CUDA graph is captured, inside `torch.compile`.

    Args:
        make: a function of its arguments alone; what it returns must not share their memory.
        *tensors: parts of a mask, or what was made of it.
        **options: what else `make` takes.
    """
    if torch.compiler.is_compiling() or not all(map(_can_be_told, tensors)):
        return make(*tensors, **options)
    place = (make, *options.items(), *map(_identity, tensors))
    if place in _cache:
        _cache.move_to_end(place)
        return _cache[place]
    with torch.inference_mode(False):  # the next to ask may want gradients
        made = make(*tensors, **options)
    for old in [place for place in _cache if _is_dead(place)]:
        del _cache[old]
    if len(_cache) >= _KEPT:
        _cache.popitem(last=False)
    _cache[place] = made
    return made


def _can_be_told(x: Tensor) -> bool:
    """Whether a tensor with other values is noticed to be another one."""
    if type(x) is not Tensor:  # traced
        return False
    if x.device.type == "cpu":
        return True
    return not (x.is_inference() or is_capturing())


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, inside which nobody can wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def constant_in_graphs(function: F) -> F:
    """`torch.compiler.assume_constant_result`, without loading the compiler, which takes seconds.

    The mark is the one that it sets, in torch 2.11 to 2.14.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _identity(x: Tensor) -> Place:
    """What two tensors of the same values have in common, and no others."""
    if x.device.type == "cpu":
        return x.dtype, x.shape, x.numpy().tobytes()
    # the reference keeps the storage's address from being used again, not its memory
    storage = StorageWeakRef(x.untyped_storage())
    return storage, x._version, x.dtype, x.storage_offset(), x.shape, x.stride()


def _is_dead(place: Place) -> bool:
    """Whether a tensor that the place tells of is gone."""
    identities = (part for part in place if isinstance(part, tuple))
    return any(isinstance(x[0], StorageWeakRef) and x[0].expired() for x in identities)
