"""Other orders of a packed row, to compare heavy-first with: the paper's, and its tiles.

An order is a list of all segments, parents before children, so that a token's ancestors stand
before it. Only heavy-first has the interval form of the mask; here visible pairs are counted
segment by segment, up the parent links, which fits any order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from flexmask.tree.tree import PrefixTree

_ANSWER_KINDS = ("response", "tool", "history")


def papers_order(tree: PrefixTree) -> list[int]:
    """The segments of one conversation in the order of arXiv 2504.18246: turn by turn.

    Each turn is its context, its thinking, the response's copy for the history, and the trained
    response. The first segments that a sample adds beside the trained answer before it are taken
    as that answer's copy.

    Args:
        tree: its leaves in the order of the turns, its segments with kinds, as `label_tree` or
            `PrefixTree.from_turns` makes them.
    """
    order: list[int] = []
    placed: set[int] = set()
    answer: list[int] = []  # the trained answer of the turn before, not placed yet
    for leaf in tree.leaves:
        added = [s for s in tree.path(leaf.segment) if s not in placed]
        placed.update(added)
        goes_on = bool(added) and tree.segments[added[0]].parent in answer
        num_copied = 0 if goes_on else _num_answer_segments(tree, added)
        if num_copied == len(added):  # nothing but an answer: its own, not the copy of another
            num_copied = 0
        num_trained = _num_answer_segments(tree, added[num_copied:][::-1])
        order += added[:num_copied] + answer + added[num_copied : len(added) - num_trained]
        answer = added[len(added) - num_trained :]
    return order + answer


def tile_counts(
    tree: PrefixTree, order: Sequence[int], block: int, *, keys: Collection[int] | None = None
) -> np.ndarray:
    """Visible pairs of each tile of a row laid out in `order`, int64 [query blocks, key blocks].

    A tile is full where the count is block * block, and empty where it is 0.

    Args:
        tree: lengths are enough.
        order: all its segments, parents before children.
        block: tile size in tokens, for queries and keys.
        keys: count only the pairs whose key is in one of these segments; all of them if None.
    """
    starts = packed_starts(tree, order)
    num_blocks = -(-tree.num_tokens // block)
    counts = np.zeros((num_blocks, num_blocks), np.int64)
    held = [_tokens_per_block(starts[s], tree.lengths[s], block) for s in range(len(order))]
    for segment in order:
        queries, num_queries = held[segment]
        for ancestor in tree.path(segment)[:-1]:
            if keys is None or ancestor in keys:
                columns, num_keys = held[ancestor]
                counts[queries, columns] += np.outer(num_queries, num_keys)
        if keys is not None and segment not in keys:
            continue
        square = np.tril(np.outer(num_queries, num_queries), -1)
        np.fill_diagonal(square, num_queries * (num_queries + 1) // 2)
        counts[queries, queries] += square
    return counts


def packed_starts(tree: PrefixTree, order: Sequence[int]) -> np.ndarray:
    """Packed position of each segment's first token in a row laid out in `order`, by segment."""
    lengths = tree.lengths[order]
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(lengths) - lengths
    return starts


def token_index(tree: PrefixTree, segments: Sequence[int]) -> np.ndarray:
    """The places of the tokens of `segments` in the tree's own token order, int64."""
    stops = tree.token_starts + tree.lengths
    return np.concatenate([np.arange(tree.token_starts[s], stops[s]) for s in segments])


def density(tree: PrefixTree, order: Sequence[int], block: int = 128) -> float:
    """Visible pairs per pair in a visited tile of block x block; 1.0 wastes no work."""
    counts = tile_counts(tree, order, block)
    return float(counts.sum() / (np.count_nonzero(counts) * block * block))


def _num_answer_segments(tree: PrefixTree, segments: list[int]) -> int:
    """How many of `segments` belong to an answer, from the start."""
    kinds = [tree.segments[s].kind in _ANSWER_KINDS for s in segments]
    return kinds.index(False) if False in kinds else len(kinds)


def _tokens_per_block(start: int, length: int, block: int) -> tuple[slice, np.ndarray]:
    """The blocks that hold tokens [start, start + length), and how many each of them holds."""
    first, last = int(start) // block, -(-int(start + length) // block)
    edges = np.clip(np.arange(first, last + 1) * block, start, start + length)
    return slice(first, last), np.diff(edges)
