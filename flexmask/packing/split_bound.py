"""A lower bound on the tokens of all pieces, for any tree.

Let D(v) be the tokens from the root through segment v, B the budget, n(v) the number of pieces that
hold v and h(v) the tokens below v in all pieces together. A piece that holds anything below v holds
all D(v), so it has at most B - D(v) tokens below v:

    n(v) >= max(1, n(c) over the children c, h(v) / (B - D(v)))
    h(v) >= sum over the children c of length(c) n(c) + h(c)

Read as equations from the leaves up, these give a bound in time linear in segments.
"""

from __future__ import annotations

from collections.abc import Iterable

from flexmask.tree.tree import PrefixTree


def fewest_tokens(tree: PrefixTree, ends: Iterable[int], max_tokens: int) -> int:
    """Tokens that pieces of at most `max_tokens` have at least, if they hold the paths to `ends`.

    Every path must fit the budget.
    """
    needed = {s for end in ends for s in tree.path(end)}
    lengths, depths = tree.lengths.tolist(), tree.depths.tolist()
    pieces = dict.fromkeys(needed, 1)
    below = dict.fromkeys(needed, 0)
    total = 0
    for segment in sorted(needed, reverse=True):
        room = max_tokens - depths[segment] - lengths[segment]
        if below[segment]:
            pieces[segment] = max(pieces[segment], -(-below[segment] // room))
        tokens = lengths[segment] * pieces[segment] + below[segment]
        parent = tree.segments[segment].parent
        if parent is None:
            total += tokens
        else:
            below[parent] += tokens
            pieces[parent] = max(pieces[parent], pieces[segment])
    return total
