"""Cutting a tree, against all ways to cut small ones that keep neighbours together."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_samples, segment_trees

from flexmask import FittedTrees, FlexmaskError, PrefixTree, Sample, build_tree, pack
from flexmask.packing.split import split_tree
from flexmask.tree.layout import lay_out


def union_size(tree, leaves):
    needed = {s for leaf in leaves for s in tree.path(tree.leaves[leaf].segment)}
    return sum(tree.segments[s].length for s in needed)


@st.composite
def cut_trees(draw):
    """A tree of at most 7 samples, and a budget that each of them fits."""
    tree = draw(segment_trees(max_segments=11).filter(lambda tree: len(tree.leaves) <= 7))
    return tree, draw(st.integers(tree.depth, max(tree.depth, tree.num_tokens - 1)))


@given(cut_trees())
def test_pieces_are_the_best_groups_of_neighbours_in_packed_order(case):
    tree, max_tokens = case
    split = split_tree(tree, max_tokens)
    starts = lay_out(tree).starts
    order = sorted(range(len(tree.leaves)), key=lambda i: int(starts[tree.leaves[i].segment]))
    cuts = range(1, len(order))
    ways = [
        [
            union_size(tree, order[start:stop])
            for start, stop in zip((0, *chosen), (*chosen, len(order)), strict=True)
        ]
        for number in range(len(order))
        for chosen in combinations(cuts, number)
    ]
    fewest = min(sum(sizes) for sizes in ways if max(sizes) <= max_tokens)
    assert sum(split.num_tokens) == fewest == tree.num_tokens + split.repeated_tokens
    assert sorted(leaf for group in split.groups for leaf in group) == sorted(order)


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


@pytest.mark.parametrize(
    ("num_turns", "turn", "max_tokens", "fewest"),
    [
        (16, (50, 500, 150), 5_000, 5_350),
        (32, (50, 500, 150), 16_384, 3_250),
        (64, (60, 600, 200), 32_768, 15_720),
    ],
)
def test_equal_turns_compute_no_more_again_than_any_cut_must(num_turns, turn, max_tokens, fewest):
    """The fewest were proven by a branch and bound over all cuts, on 2026-11-26."""
    split = split_tree(PrefixTree.from_turns([turn] * num_turns), max_tokens)
    assert max(split.num_tokens) <= max_tokens
    assert split.repeated_tokens == fewest


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
        "dropped_samples": 2,
        "lost_trees": 1,
        "truncated_samples": 0,
    }
    assert "2 samples dropped, longer than the budget, and with them 1 whole" in str(rows.split)


def test_truncated_trees_are_those_of_their_first_tokens_and_listed():
    trees = [build_tree(SHORT_AND_LONG), build_tree(SHORT_AND_LONG[1:])]
    fitted = FittedTrees(Shelf(trees), 3, on_overflow="truncate")
    ids = [fitted[index].input_ids.tolist() for index in range(len(fitted))]
    assert ids == [[1, 3, 4], [1, 2], [1, 3, 4]]
    assert fitted.truncated == [("shelf 0", "long"), ("shelf 1", "long")]
    assert str(fitted.split).endswith("; 2 samples truncated to the budget")
    fitted = FittedTrees(Shelf(trees), 2, on_overflow="truncate")
    assert fitted.dropped == [("shelf 0", "long"), ("shelf 1", "long")]
    assert not fitted.truncated
    assert len(fitted) == 1


@pytest.mark.parametrize(
    ("max_tokens", "on_overflow", "message"),
    [
        (3, "split", "shelf 0, sample 'long': must have at most max_tokens = 3 tokens, got 4"),
        (4, "error", "shelf 0: must have at most max_tokens = 4 tokens, got 5"),
        (1, "drop", "every sample is longer than max_tokens = 1"),
        (0, "split", "max_tokens must be an integer of at least 1, got 0"),
        (4, "keep_start", "on_overflow must be one of"),
    ],
)
def test_fitted_trees_refuse_what_pack_refuses(max_tokens, on_overflow, message):
    with pytest.raises(FlexmaskError, match=message):
        FittedTrees(Shelf([build_tree(SHORT_AND_LONG)]), max_tokens, on_overflow=on_overflow)
