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


def make_row(
    name: str, trees: Sequence[PrefixTree], num_tokens: int, *, is_short: bool = False
) -> KernelRow:
    """The row of `trees`, filled up with padding to `num_tokens`."""
    mask = compile_mask(trees)
    used = mask.shape[1]
    padding = torch.arange(used, num_tokens, dtype=torch.int32)
    positions = mask.position_ids if mask.position_ids is not None else torch.zeros(1, used)
    end = torch.cat([mask.subtree_end[0], padding + 1])
    depths = torch.cat([positions[0].int(), torch.zeros_like(padding)])
    order, samples, start = [], [], 0
    for tree in trees:
        starts = lay_out(tree).starts + start
        tokens = [
            np.arange(first, first + segment.length)
            for first, segment in zip(starts, tree.segments, strict=True)
        ]
        order += [tokens[i] for i in segment_orders(tree)["paper's order"]]
        samples += [
            torch.from_numpy(np.concatenate([tokens[i] for i in tree.path(leaf.segment)]))
            for leaf in tree.leaves
        ]
        start += tree.num_tokens
    paper_order = torch.from_numpy(np.concatenate([*order, padding.numpy()]))
    return KernelRow(name, is_short, TreeMask(end, depths), used, paper_order, samples)


def row_makers(*, quick: bool) -> dict[str, Callable[[], KernelRow]]:
    """How to make each row, by name, the most telling first."""
    if quick:
        small = PrefixTree.from_turns([(2, 5, 3)] * 2)
        return {
            "2 turns to 32": lambda: make_row("2 turns to 32", [small], 32),
            "2-6 turns to 32": lambda: make_row(
                "2-6 turns to 32", _short(32, size=0.01), 32, is_short=True
            ),
        }
    trees: dict[str, tuple[int, Callable[[], list[PrefixTree]]]] = {
        "16 x 60/300/120 to 32K": (2**15, lambda: long_conversations(2**15)),
        "2-6 turns to 32K": (2**15, lambda: _short(2**15)),
        "16 x 60/300/120 to 128K": (2**17, lambda: long_conversations(2**17)),
        "16 x 60/300/120 to 16K": (2**14, lambda: long_conversations(2**14)),
        "32 x 50/500/150 to 32K": (2**15, lambda: _filled(32, (50, 500, 150), 2**15)),
        "8 x 200/1500/300 to 32K": (2**15, lambda: _filled(8, (200, 1500, 300), 2**15)),
    }

    def maker(name: str) -> Callable[[], KernelRow]:
        num_tokens, make_trees = trees[name]
        is_short = name.startswith("2-6 turns")
        return lambda: make_row(name, make_trees(), num_tokens, is_short=is_short)

    return {name: maker(name) for name in trees}


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
