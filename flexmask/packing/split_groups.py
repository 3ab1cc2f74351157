"""Paths grouped under a budget, so that the groups have the fewest tokens in total.

History that two groups hold is computed twice. To choose the groups is to pack bins whose items
share content, NP-hard as bin packing is (a root with many leaves is bin packing). So:

1. of the groups that are contiguous in packed order, the best, by dynamic programming: a cut costs
   what the two neighbours share;
2. a depth-first branch and bound over all groups, for a limited number of nodes. It starts with the
   path of the longest history and lets each next path join a group or open one; the bound lets
   tokens be split at will, which makes filling from the deepest history upwards optimal;
3. where that ran out, the same search on neighbouring groups, until none of them improves or the
   searches run out.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from flexmask.packing.split_branches import Branches

Groups = list[list[int]]

_MAX_NODES = 4_000  # of one search: some 40 ms
_NEIGHBOURS = 3  # groups that are taken apart at once in a large tree
_MAX_SEARCHES = 32  # among the neighbours of one tree


def best_groups(branches: Branches, fewest: int) -> tuple[Groups, bool]:
    """Groups of paths within the budget, of few tokens in total; and whether none have fewer.

    Args:
        branches: the paths.
        fewest: a lower bound on the total; the search ends where it is met.
    """
    groups = contiguous_groups(branches)
    if cost_of(branches, groups) == fewest:
        return groups, True
    groups, is_proven = search(branches, groups, fewest)
    if not is_proven:
        groups = _improve(branches, groups, fewest)
    return groups, is_proven or cost_of(branches, groups) == fewest


def cost_of(branches: Branches, groups: Groups) -> int:
    """Tokens of all groups together."""
    return sum(map(branches.num_tokens, groups))


def contiguous_groups(branches: Branches) -> Groups:
    """The groups of fewest tokens, then of fewest groups, contiguous in packed order."""
    best: list[tuple[int, int]] = [(0, 0)]  # (tokens shared over the cuts, groups), by paths so far
    cut: list[int] = []
    for stop in range(1, len(branches) + 1):
        tokens = 0
        choices = []
        for start in range(stop - 1, -1, -1):
            # The union of start:stop has the whole first path and what each later one adds to it.
            if tokens + branches.lengths[start] > branches.max_tokens:
                break
            repeated, num_groups = best[start]
            choices.append((repeated + branches.shared[start], num_groups + 1, start))
            tokens += branches.lengths[start] - branches.shared[start]
        *value, start = min(choices)
        best.append((value[0], value[1]))
        cut.append(start)
    groups: Groups = []
    stop = len(branches)
    while stop:
        start = cut[stop - 1]
        groups.append(list(range(start, stop)))
        stop = start
    return groups[::-1]


def search(
    branches: Branches, incumbent: Groups, fewest: int = 0, max_nodes: int = _MAX_NODES
) -> tuple[Groups, bool]:
    """The best groups that a branch and bound finds, and whether it proved that none are better.

    Args:
        branches: the paths.
        incumbent: groups to start from.
        fewest: a lower bound on the tokens; the search ends where it is met.
        max_nodes: how many assignments are tried at most.
    """
    budget = branches.max_tokens
    best, best_cost = incumbent, cost_of(branches, incumbent)
    private = [
        length - max(shared, history)
        for length, shared, history in zip(
            branches.lengths, branches.shared, branches.history, strict=True
        )
    ]
    private_before = [0, *accumulate(private)]
    masks: list[int] = []
    sizes: list[int] = []
    members: Groups = []

    def lower_bound(index: int) -> int:
        """The least total once `index` paths are placed, if the others could be split at will."""
        total = sum(sizes)
        bound = total + private_before[-1] - private_before[index]
        reach = private_before[index] + len(sizes) * budget - total
        while reach < private_before[-1]:
            history = branches.history[bisect_right(private_before, reach) - 1]
            bound += history
            reach += budget - history
        return bound

    def choices(index: int) -> list[tuple[int, int, int]]:
        """(tokens added, room left, group) for each way to place a path, most promising last."""
        found = [(branches.lengths[index], budget - branches.lengths[index], len(masks))]
        for group, mask in enumerate(masks):
            added = branches.added(index, mask)
            if sizes[group] + added <= budget:
                found.append((added, budget - sizes[group] - added, group))
        return sorted(found, reverse=True)

    def undo(group: int, mask: int, added: int) -> None:
        members[group].pop()
        masks[group] = mask
        sizes[group] -= added
        if not members[group]:
            for opened in (members, masks, sizes):
                opened.pop()

    open_choices = [choices(0)]
    undone: list[tuple[int, int, int]] = []
    num_nodes = 0
    while open_choices:
        if not open_choices[-1]:
            open_choices.pop()
            if undone:
                undo(*undone.pop())
            continue
        added, _, group = open_choices[-1].pop()
        index = len(undone)
        if group == len(masks):
            members.append([])
            masks.append(0)
            sizes.append(0)
        undone.append((group, masks[group], added))
        members[group].append(index)
        masks[group] |= branches.masks[index]
        sizes[group] += added
        num_nodes += 1
        if index + 1 == len(branches):
            cost = sum(sizes)
            if (cost, len(sizes)) < (best_cost, len(best)):
                best, best_cost = [list(group) for group in members], cost
            if best_cost <= fewest:
                return best, True
            undo(*undone.pop())
        elif lower_bound(index + 1) >= best_cost:
            undo(*undone.pop())
        else:
            open_choices.append(choices(index + 1))
        if num_nodes == max_nodes:
            return best, False
    return best, True


def _improve(branches: Branches, groups: Groups, fewest: int) -> Groups:
    """The groups after searches among neighbours, until none of them improves."""
    groups = sorted(groups)
    total = cost_of(branches, groups)
    start = 0
    since_improved = 0
    for _ in range(_MAX_SEARCHES):
        num_windows = len(groups) - _NEIGHBOURS + 1
        if since_improved >= num_windows or num_windows < 2 or total <= fewest:
            break
        start %= num_windows
        window = groups[start : start + _NEIGHBOURS]
        taken = sorted(index for group in window for index in group)
        part = branches.subset(taken)
        place = {index: number for number, index in enumerate(taken)}
        before = [[place[index] for index in group] for group in window]
        after, _ = search(part, before)
        gained = cost_of(part, before) - cost_of(part, after)
        since_improved = 0 if gained else since_improved + 1
        if gained:
            total -= gained
            groups[start : start + _NEIGHBOURS] = [[taken[i] for i in group] for group in after]
            groups.sort()
        start += 1
    return groups
