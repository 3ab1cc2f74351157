"""Cutting a tree: against brute force on small trees, against the lower bound on large ones."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_samples, segment_trees

from flexmask import FittedTrees, FlexmaskError, PrefixTree, Sample, Segment, build_tree, pack
from flexmask.packing.split import split_tree
from flexmask.packing.split_bound import fewest_tokens
from flexmask.packing.split_branches import branches_of
from flexmask.packing.split_groups import best_groups, contiguous_groups, cost_of, search


def union_size(tree, leaves):
    needed = {s for leaf in leaves for s in tree.path(tree.leaves[leaf].segment)}
    return sum(tree.segments[s].length for s in needed)


def partitions(items):
    """All ways to group `items`."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


def brute_force(tree, max_tokens, ways):
    """The fewest tokens of any of these ways to group samples within the budget."""
    sizes = ([union_size(tree, group) for group in groups] for groups in ways)
    return min(sum(way) for way in sizes if max(way) <= max_tokens)


@st.composite
def cut_trees(draw):
    """A tree of at most 7 samples, and a budget that each of them fits."""
    tree = draw(segment_trees(max_segments=11).filter(lambda tree: len(tree.leaves) <= 7))
    return tree, draw(st.integers(tree.depth, max(tree.depth, tree.num_tokens - 1)))


@given(cut_trees())
def test_pieces_have_the_fewest_tokens_of_all_ways_to_cut(case):
    tree, max_tokens = case
    split = split_tree(tree, max_tokens)
    fewest = brute_force(tree, max_tokens, partitions(list(range(len(tree.leaves)))))
    assert sum(split.num_tokens) == split.fewest_tokens == fewest
    assert split.repeated_tokens == split.fewest_repeated_tokens == fewest - tree.num_tokens
    assert sorted(leaf for group in split.groups for leaf in group) == list(range(len(tree.leaves)))


@given(cut_trees())
def test_no_way_to_cut_is_below_the_bound(case):
    tree, max_tokens = case
    bound = fewest_tokens(tree, [leaf.segment for leaf in tree.leaves], max_tokens)
    ways = partitions(list(range(len(tree.leaves))))
    assert tree.num_tokens <= bound <= brute_force(tree, max_tokens, ways)


@given(cut_trees())
def test_contiguous_groups_are_the_best_contiguous_ones(case):
    tree, max_tokens = case
    branches = branches_of(tree, range(len(tree.leaves)), max_tokens)
    leaf_of = {leaf.segment: index for index, leaf in enumerate(tree.leaves)}
    order = [leaf_of[end] for end in branches.ends]
    ways = (
        [order[start:stop] for start, stop in zip((0, *cuts), (*cuts, len(order)), strict=True)]
        for number in range(len(order))
        for cuts in combinations(range(1, len(order)), number)
    )
    groups = contiguous_groups(branches)
    assert cost_of(branches, groups) == brute_force(tree, max_tokens, ways)
    assert [index for group in groups for index in group] == list(range(len(branches)))


@given(cut_trees())
def test_pieces_are_trees_of_their_samples(case):
    tree, max_tokens = case
    split = split_tree(tree, max_tokens)
    for piece, group, size, pairs in zip(
        split.pieces(), split.groups, split.num_tokens, split.num_pairs, strict=True
    ):
        assert piece.num_tokens == size == union_size(tree, group) <= max_tokens
        assert piece.num_pairs == pairs
        lengths = [tree.sample_length(tree.leaves[leaf]) for leaf in group]
        assert [piece.sample_length(leaf) for leaf in piece.leaves] == lengths


def conversation(seed, num_turns, turn):
    rng = np.random.default_rng(seed)
    lengths = np.array(turn) * rng.lognormal(0, 0.7, (num_turns, 3)) + 1
    return PrefixTree.from_turns([tuple(turn) for turn in lengths.astype(int).tolist()])


@pytest.mark.parametrize(
    ("num_turns", "turn", "max_tokens"),
    [(32, (50, 500, 150), 16_384), (64, (60, 600, 200), 32_768), (256, (60, 900, 200), 131_072)],
)
def test_long_conversations_are_cut_close_to_the_bound(num_turns, turn, max_tokens):
    repeated = fewest = 0
    for seed in range(4):
        split = split_tree(conversation(seed, num_turns, turn), max_tokens)
        assert max(split.num_tokens) <= max_tokens
        repeated += split.repeated_tokens
        fewest += split.fewest_repeated_tokens
    assert fewest <= repeated <= 1.01 * fewest


def test_rollouts_of_one_prompt_are_packed_like_bins():
    sizes = np.random.default_rng(0).integers(100, 1500, 200).tolist()
    tree = PrefixTree.from_segments([Segment(500), *(Segment(size, 0) for size in sizes)])
    split = split_tree(tree, 4096)
    assert max(split.num_tokens) <= 4096
    assert len(split) <= -(-sum(sizes) // (4096 - 500)) + 1
    assert split.repeated_tokens == 500 * (len(split) - 1)


def test_a_search_that_runs_out_keeps_what_it_has():
    tree = conversation(1, 40, (50, 500, 150))
    max_tokens = tree.depth + 300
    branches = branches_of(tree, range(len(tree.leaves)), max_tokens)
    start = contiguous_groups(branches)
    groups, is_proven = search(branches, start, max_nodes=50)
    assert not is_proven
    assert cost_of(branches, groups) <= cost_of(branches, start)
    better, _ = best_groups(branches, fewest=0)
    assert cost_of(branches, better) <= cost_of(branches, groups)
    assert sorted(index for group in better for index in group) == list(range(len(branches)))
    assert max(map(branches.num_tokens, better)) <= max_tokens


SHORT_AND_LONG = [Sample([1, 2], [0, 1], "short"), Sample([1, 3, 4, 5], [0, 0, 1, 1], "long")]


class Shelf:
    """A dataset that knows sizes, and notes which trees it was asked for."""

    def __init__(self, trees):
        self.trees, self.read = trees, []
        self.num_tokens = np.array([tree.num_tokens for tree in trees])
        self.num_pairs = np.array([tree.num_pairs for tree in trees])

    def __len__(self):
        return len(self.trees)

    def __getitem__(self, index):
        self.read.append(index)
        return self.trees[index]

    def place(self, index):
        return f"shelf {index}"


def test_fitted_trees_are_the_pieces_that_pack_makes():
    trees = [build_tree(random_samples(seed, num_samples=seed + 1)) for seed in range(9)]
    shelf = Shelf(trees)
    fitted = FittedTrees(shelf, 60)
    assert shelf.read == [i for i, tree in enumerate(trees) if tree.num_tokens > 60] != []
    items = [fitted[index] for index in range(len(fitted))]
    assert [tree.num_tokens for tree in items] == fitted.num_tokens.tolist()
    assert [tree.num_pairs for tree in items] == fitted.num_pairs.tolist()
    expected = [piece for tree in trees for piece in split_tree(tree, 60).pieces()]
    for ours, theirs in zip(items, expected, strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.loss_weights.tolist() == theirs.loss_weights.tolist()
    assert fitted.split == pack(trees, 60).split
    assert fitted.split.pieces == len(fitted) - len(trees) + fitted.split.trees
    assert fitted.place(len(fitted) - 1) == "shelf 8"


def test_what_is_too_long_is_dropped_and_counted_the_same_everywhere():
    trees = [build_tree(SHORT_AND_LONG), build_tree(SHORT_AND_LONG[1:])]
    fitted, rows = FittedTrees(trees, 3, on_overflow="drop"), pack(trees, 3, on_overflow="drop")
    assert fitted.dropped == [("tree 0", "long"), ("tree 1", "long")]
    assert rows.dropped == ("long", "long")
    assert fitted.split == rows.split
    assert dataclasses.asdict(fitted.split) == {
        "trees": 2,
        "pieces": 1,
        "repeated_tokens": 0,
        "fewest_repeated_tokens": 0,
        "dropped_samples": 2,
        "lost_trees": 1,
    }
    assert "2 samples dropped, longer than the budget, and with them 1 whole" in str(rows.split)


@pytest.mark.parametrize(
    ("max_tokens", "on_overflow", "message"),
    [
        (3, "split", "shelf 0, sample 'long': must have at most max_tokens = 3 tokens, got 4"),
        (4, "error", "shelf 0: must have at most max_tokens = 4 tokens, got 5"),
        (1, "drop", "every sample is longer than max_tokens = 1"),
        (0, "split", "max_tokens must be at least 1, got 0"),
        (4, "truncate", "on_overflow must be one of"),
    ],
)
def test_fitted_trees_refuse_what_pack_refuses(max_tokens, on_overflow, message):
    with pytest.raises(FlexmaskError, match=message):
        FittedTrees(Shelf([build_tree(SHORT_AND_LONG)]), max_tokens, on_overflow=on_overflow)
