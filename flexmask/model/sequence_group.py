"""Sequence parallelism after Ulysses: each of n ranks holds L/n tokens of every row.

All layers but attention see one token at a time, and run on a rank's own tokens. Around attention,
tokens are exchanged for heads and back, so that it runs as ever, on whole rows with H/n heads:

    q [B, H, L/n, D]  ->  [B, H/n, L, D]        out [B, H/n, L, D_v]  ->  [B, H, L/n, D_v]

To all around the model a group of n ranks is n data-parallel ranks that were given the same batch:
each returns the loss of the whole batch, and gradients are to be averaged over the ranks, as DDP
and FSDP do. A rank's own gradient is n times the share of its tokens.

Jacobs et al., DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_to_all_single_autograd

from flexmask.errors import DataError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that hold the tokens of the same rows, in order.

    Attributes:
        group: the process group.
        size: how many ranks it has, n.
        rank: which of them this process is; it holds tokens [rank * L/n, (rank + 1) * L/n).
    """

    group: Any
    size: int
    rank: int

    @classmethod
    def of(cls, group: Any) -> SequenceGroup:
        """That of a process group.

        Raises:
            UnsupportedModelError: it is none, or this process is not in it.
        """
        if not isinstance(group, distributed.ProcessGroup):
            raise UnsupportedModelError(
                f"sequence_group must be a process group of torch.distributed with this process in "
                f"it, got {group!r}; take one from torch.distributed.new_group or DeviceMesh"
            )
        return cls(group, group.size(), group.rank())

    def __deepcopy__(self, memo: Any) -> SequenceGroup:
        return self  # copies of a model are of the same group

    def cut(self, x: Tensor) -> Tensor:
        """This rank's tokens of `x` [B, L, ...].

        Raises:
            DataError: rows that cannot be cut evenly.
        """
        if x.shape[1] % (2 * self.size):
            raise DataError(
                f"rows cut over {self.size} processes must have a multiple of {2 * self.size} "
                f"tokens, got {x.shape[1]}; pad them, TreeCollator(pad_to_multiple_of="
                f"{2 * self.size})"
            )
        return x.chunk(self.size, dim=1)[self.rank]

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of all ranks, [B, L, ...], by this rank's, [B, L/n, ...]."""
        return self._exchange(x.expand(self.size, *x.shape)).transpose(0, 1).flatten(1, 2)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks; its gradient is added up over them, too."""
        return self._exchange(x.expand(self.size, *x.shape)).sum(0)

    def check_same(self, *tensors: Tensor) -> None:
        """Raise DataError unless all ranks hold the same integer tensors."""
        digest = torch.stack([_digest(x) for x in tensors])
        everyone = [torch.empty_like(digest) for _ in range(self.size)]
        distributed.all_gather(everyone, digest, self.group)
        first, *others = torch.stack(everyone).tolist()
        for rank, other in enumerate(others, 1):
            if other != first:
                raise DataError(
                    f"all {self.size} processes of a sequence_group must be given the same batch, "
                    f"but number {rank} has another than number 0; TreeTrainer deals them so"
                )

    def over_heads(
        self,
        attend: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention over whole rows by shards of their tokens, L/n of them in and out.

        Args:
            attend: takes queries, keys, values and sinks of some heads, and whole rows.
            q: [B, H, L/n, D].
            k: [B, H_kv, L/n, D].
            v: [B, H_kv, L/n, D_v].
            sinks: [H] or None.

        Returns:
            [B, H, L/n, D_v].
        """
        heads = Heads.of(q.shape[1], k.shape[1], self.size)
        split = [heads.pad_queries(q), heads.pad_keys(k), heads.pad_keys(v)]
        widths = [x.shape[1] // self.size * x.shape[3] for x in split]
        sent = torch.cat([self._by_heads(x).flatten(3) for x in split], dim=3)
        whole = self._exchange(sent).transpose(0, 1).flatten(1, 2).split(widths, dim=2)
        q, k, v = (
            x.unflatten(2, (-1, own.shape[3])).transpose(1, 2).contiguous()
            for x, own in zip(whole, split, strict=True)
        )
        if sinks is not None:
            sinks = heads.pad_queries(sinks[None])[0].chunk(self.size)[self.rank]
        out = attend(q, k, v, sinks)
        sent = out.unflatten(2, (self.size, -1)).permute(2, 0, 3, 1, 4)
        return heads.drop_padding(self._exchange(sent).permute(1, 0, 3, 2, 4).flatten(1, 2))

    def _by_heads(self, x: Tensor) -> Tensor:
        """Heads [B, H, L/n, D] by the rank that they go to, [n, B, L/n, H/n, D]."""
        return x.unflatten(1, (self.size, -1)).permute(1, 0, 3, 2, 4)

    def _exchange(self, x: Tensor) -> Tensor:
        """Part i of `x` [n, ...] goes to rank i; what rank i sends here is part i of the result."""
        ones = [1] * self.size
        return all_to_all_single_autograd(x.contiguous(), ones, ones, self.group)


class Heads(NamedTuple):
    """How heads are spread evenly over n ranks: key heads are repeated, the rest is padded.

    Each of `num_keys` key heads belongs to `group` query heads. It is repeated `copies` times, with
    `per_copy` query heads for each, and there are `padded` copies of all key heads, a multiple of
    n. What is padded are heads of zeros, whose output is dropped.
    """

    num_keys: int
    group: int
    copies: int
    per_copy: int
    padded: int

    @classmethod
    def of(cls, num_heads: int, num_keys: int, size: int) -> Heads:
        """The fewest query heads over `size` ranks, and among these the fewest key heads.

        >>> Heads.of(14, 2, 4)
        Heads(num_keys=2, group=7, copies=2, per_copy=4, padded=4)
        """
        group = num_heads // num_keys
        ways = []
        for copies in range(1, group + 1):
            per_copy = -(-group // copies)
            padded = -(-num_keys * copies // size) * size
            ways.append((padded * per_copy, padded, cls(num_keys, group, copies, per_copy, padded)))
        return min(ways)[2]

    def pad_queries(self, x: Tensor) -> Tensor:
        """Query heads [B, H, ...] with padding, [B, padded * per_copy, ...]."""
        x = _pad(x.unflatten(1, (self.num_keys, self.group)), 2, self.copies * self.per_copy)
        x = x.unflatten(2, (self.copies, self.per_copy)).flatten(1, 2)
        return _pad(x, 1, self.padded).flatten(1, 2)

    def pad_keys(self, x: Tensor) -> Tensor:
        """Key heads [B, H_kv, ...] with copies and padding, [B, padded, ...]."""
        if self.copies > 1:
            x = x.repeat_interleave(self.copies, dim=1)
        return _pad(x, 1, self.padded)

    def drop_padding(self, x: Tensor) -> Tensor:
        """Query heads [B, padded * per_copy, ...] without padding, [B, H, ...]."""
        x = x.unflatten(1, (self.padded, self.per_copy))[:, : self.num_keys * self.copies]
        x = x.unflatten(1, (self.num_keys, self.copies)).flatten(2, 3)
        return x[:, :, : self.group].flatten(1, 2)


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with zeros behind, to `size` along `dim`."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    return torch.cat((x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])), dim)


def _digest(x: Tensor) -> Tensor:
    """A number, int64 [], that follows from the shape and the integers of `x`."""
    flat = x.flatten().long() + 1
    factors = torch.arange(1, flat.numel() + 1, device=x.device) * 0x9E3779B1
    return (flat * (factors ^ (factors >> 15))).sum() + x.shape[1]
