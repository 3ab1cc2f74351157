"""The packed rows that kernels are measured on, each in heavy-first and in the paper's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.conversations import Turn, long_conversations
from benchmarks.layout import segment_orders
from flexmask import PrefixTree, TreeMask, compile_mask
from flexmask.packing.rows import sample_indices
from flexmask.tree.layout import lay_out

_SHORT_LENGTHS = (20, 50, 20), (150, 500, 200)  # least and most: context, reasoning, response


class KernelRow(NamedTuple):
    """One packed row; everything on the CPU.

    Attributes:
        name: what it holds, in a few words.
        is_short: many short conversations, which have goals of their own.
        mask: of one row of L tokens.
        num_used: tokens of trees; the rest, at the end of the row, is padding.
        paper_order: int64 [L], the packed place of each token of the paper's order.
        samples: int64 [n] each, the packed places of a sample's tokens.
    """

    name: str
    is_short: bool
    mask: TreeMask
    num_used: int
    paper_order: Tensor
    samples: list[Tensor]


def make_row(name: str, trees: Sequence[PrefixTree], num_tokens: int) -> KernelRow:
    """The row of `trees`, filled up with padding to `num_tokens`."""
    ends = compile_mask(trees).subtree_end[0]
    used = ends.numel()
    padding = torch.arange(used, num_tokens, dtype=torch.int32)
    order, samples, start = [], [], 0
    for tree in trees:
        layout = lay_out(tree)
        samples += [torch.from_numpy(index) for index in sample_indices(tree, layout, start)]
        for segment in segment_orders(tree)["paper's order"]:
            first = layout.starts[segment] + start
            order.append(np.arange(first, first + tree.segments[segment].length))
        start += tree.num_tokens
    paper_order = torch.from_numpy(np.concatenate([*order, padding.numpy()]))
    mask = TreeMask(torch.cat([ends, padding + 1]))
    return KernelRow(name, name.startswith("2-6 turns"), mask, used, paper_order, samples)


def row_names(*, quick: bool) -> list[str]:
    """The names of the rows, the most telling first."""
    return [*(_QUICK if quick else _FULL)]


def named_row(name: str) -> KernelRow:
    """The row of a name."""
    num_tokens, make_trees = (_FULL | _QUICK)[name]
    return make_row(name, make_trees(), num_tokens)


def _filled(number: int, turn: Turn, num_tokens: int) -> list[PrefixTree]:
    """Conversations of `number` turns, the last one of as many as there is room for."""
    trees, room = [], num_tokens
    while number > 0:
        tree = PrefixTree.from_turns([turn] * number)
        if tree.num_tokens <= room:
            trees.append(tree)
            room -= tree.num_tokens
        else:
            number -= 1
    return trees


def _short(num_tokens: int, *, size: float = 1.0) -> list[PrefixTree]:
    """Conversations of 2 to 6 turns of random lengths, `size` times the usual ones."""
    rng = np.random.default_rng(0)
    trees: list[PrefixTree] = []
    room = num_tokens
    while True:
        lengths = size * rng.integers(*_SHORT_LENGTHS, size=(rng.integers(2, 7), 3))
        tree = PrefixTree.from_turns(lengths.astype(int).clip(1).tolist())
        if tree.num_tokens > room:
            return trees
        trees.append(tree)
        room -= tree.num_tokens


_FULL: dict[str, tuple[int, Callable[[], list[PrefixTree]]]] = {
    "16 x 60/300/120 to 32K": (2**15, lambda: long_conversations(2**15)),
    "2-6 turns to 32K": (2**15, lambda: _short(2**15)),
    "16 x 60/300/120 to 128K": (2**17, lambda: long_conversations(2**17)),
    "16 x 60/300/120 to 16K": (2**14, lambda: long_conversations(2**14)),
    "32 x 50/500/150 to 32K": (2**15, lambda: _filled(32, (50, 500, 150), 2**15)),
    "8 x 200/1500/300 to 32K": (2**15, lambda: _filled(8, (200, 1500, 300), 2**15)),
}
_QUICK: dict[str, tuple[int, Callable[[], list[PrefixTree]]]] = {
    "2 turns to 32": (32, lambda: [PrefixTree.from_turns([(2, 5, 3)] * 2)]),
    "2-6 turns to 32": (32, lambda: _short(32, size=0.01)),
}
