"""Samples merged into a prefix tree."""

import sys

import numpy as np
import pytest
from hypothesis import example, given
from strategies import sample_lists, segment_trees

from flexmask import FlexmaskError, PrefixTree, Sample, Segment, build_tree


def tokens_of(tree, leaf):
    """The token ids on the path to `leaf`, read from the tree's own arrays."""
    heads = np.cumsum(tree.lengths) - tree.lengths
    parts = [tree.input_ids[heads[s] : heads[s] + tree.lengths[s]] for s in tree.path(leaf.segment)]
    return np.concatenate(parts).tolist()


def distinct_prefixes(samples):
    return {tuple(s.input_ids[:n].tolist()) for s in samples for n in range(1, len(s) + 1)}


@given(sample_lists())
@example([Sample([1], [1]), Sample([1], [1])])
@example([Sample([1, 2], [0, 1], "a"), Sample([1, 3], [0, 1], "b"), Sample([1], [0], "c")])
def test_each_path_spells_its_sample(samples):
    tree = build_tree(samples)
    assert [leaf.key for leaf in tree.leaves] == [sample.key for sample in samples]
    for leaf, sample in zip(tree.leaves, samples, strict=True):
        assert tokens_of(tree, leaf) == sample.input_ids.tolist()
    assert tree.num_sample_tokens == sum(len(sample) for sample in samples)
    assert tree.depth == max(len(sample) for sample in samples)


@given(sample_lists())
def test_nodes_are_distinct_prefixes_where_no_targets_conflict(samples):
    untrained = [Sample(s.input_ids, np.zeros(len(s)), s.key) for s in samples]
    assert build_tree(untrained).num_tokens == len(distinct_prefixes(samples))


@given(sample_lists())
def test_an_early_fork_costs_one_token_per_conflicting_target(samples):
    targets: dict[tuple, set] = {}
    for sample in samples:
        ids = sample.input_ids.tolist()
        for n in range(1, len(ids)):
            if sample.loss_weights[n] > 0:
                targets.setdefault(tuple(ids[:n]), set()).add(ids[n])
    extra = sum(len(tokens) - 1 for tokens in targets.values())
    assert build_tree(samples).num_tokens == len(distinct_prefixes(samples)) + extra


@given(sample_lists())
def test_weights_add_up_to_those_of_the_samples(samples):
    total = sum(float(sample.loss_weights[1:].sum()) for sample in samples)
    assert build_tree(samples).loss_weights.sum() == pytest.approx(total)


@given(sample_lists())
def test_segments_are_maximal(samples):
    tree = build_tree(samples)
    ends = {leaf.segment for leaf in tree.leaves}
    num_children = np.bincount(
        [s.parent for s in tree.segments if s.parent is not None], minlength=len(tree.segments)
    )
    for index in range(len(tree.segments)):
        assert num_children[index] != 1 or index in ends


@given(segment_trees())
def test_parents_come_before_children(tree):
    assert all(s.parent is None or s.parent < i for i, s in enumerate(tree.segments))


def lines_run(function, *arguments):
    """How many lines of Python a call executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


def rollouts(number):
    """A group that shares a prompt, trained from the first token after it."""
    return [Sample([1, 2, 3 + key, 4, 5], [0, 0, 1, 1, 1], key) for key in range(number)]


def pairs_that_fork_late(number):
    """Pairs under one prompt, each with its own fork between trained tokens."""
    return [
        Sample([1, 3 + key, 2, answer], [0, 0, 0, 1]) for key in range(number) for answer in (0, 1)
    ]


@pytest.mark.parametrize("samples", [rollouts, pairs_that_fork_late])
def test_work_is_linear_in_the_branches_of_a_fork(samples):
    few, many = (lines_run(build_tree, samples(number)) for number in (100, 400))
    assert many < 4.4 * few


def test_turns_hold_responses_twice_except_the_last_and_those_without_reasoning():
    tree = PrefixTree.from_turns([(6, 30, 12), (6, 0, 5), (6, 30, 12)])
    assert [s.kind for s in tree.segments] == [
        *("context", "reasoning", "response", "history"),
        *("context", "response"),
        *("context", "reasoning", "response"),
    ]
    assert tree.num_tokens == (6 + 30 + 12 + 12) + (6 + 5) + (6 + 30 + 12)
    assert tree.num_sample_tokens == 48 + (18 + 11) + (18 + 11 + 48)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "needs at least one segment"),
        ([Segment(0)], r"segment 0: length must be an integer of at least 1, got 0"),
        ([Segment(1.5)], r"segment 0: length must be an integer of at least 1, got 1.5"),
        ([Segment(1), Segment(1, 7)], r"segment 1: parent must be in \[0, 1\), got 7"),
        ([Segment(1), Segment(1, 0.0)], r"segment 1: parent must be in \[0, 1\), got 0\.0"),
        ([Segment(1, 0)], r"segment 0: parent must be in \[0, 0\), got 0"),
    ],
)
def test_rejects_segments_that_are_no_tree(segments, message):
    with pytest.raises(FlexmaskError, match=message):
        PrefixTree.from_segments(segments)


@pytest.mark.parametrize("turn", [(0, 0, 0), (-1, 2, 3), (1, 2), (1, 2.5, 3)])
def test_rejects_a_turn_without_tokens(turn):
    with pytest.raises(FlexmaskError, match="turn 1: must be"):
        PrefixTree.from_turns([(1, 1, 1), turn])


def test_rejects_an_empty_list_of_samples():
    with pytest.raises(FlexmaskError, match="at least one sample"):
        build_tree([])
