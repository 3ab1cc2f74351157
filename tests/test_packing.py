"""Rows, batches, splitting, weighting and gathering."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import random_samples, sample_lists
from transformers import AutoTokenizer

from flexmask import FlexmaskError, PrefixTree, Sample, TreeCollator, build_tree, pack
from flexmask.data.files import read_conversations
from flexmask.data.samples import weigh_samples
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.packing.rows import PackedRow, stack_rows

IGNORE = -100
# Trained tokens that a short sample shares with one that is too long for a row of three.
SHARED = [Sample([1, 2, 3], [0, 1, 0.5], 0), Sample([1, 2, 3, 4], [0, 0.25, 1, 1], 1)]


def npass_targets(samples):
    """Summed weight of each (context, target) pair, over separate sequences."""
    total = defaultdict(float)
    for sample in samples:
        ids = sample.input_ids.tolist()
        for n in range(1, len(ids)):
            if sample.loss_weights[n] > 0:
                total[tuple(ids[:n]), ids[n]] += float(sample.loss_weights[n])
    return total


def row_targets(rows):
    """The same, read off packed rows: the context of a position is what it sees."""
    total = defaultdict(float)
    for row in rows:
        for p in np.flatnonzero(row.shift_labels != IGNORE):
            seen = (np.arange(len(row)) <= p) & (p < row.subtree_end)
            context = tuple(row.input_ids[seen].tolist())
            total[context, int(row.shift_labels[p])] += row.loss_weights[p]
    return total


@given(st.lists(sample_lists(), min_size=1, max_size=3))
def test_row_targets_equal_npass_sums(conversations):
    rows = pack([build_tree(samples) for samples in conversations])
    everything = [sample for samples in conversations for sample in samples]
    assert row_targets(rows) == pytest.approx(npass_targets(everything))
    assert ((rows[0].loss_weights > 0) == (rows[0].shift_labels != IGNORE)).all()


@given(st.lists(sample_lists(), min_size=1, max_size=3))
def test_gather_inverts_packing(conversations):
    (row,) = pack([build_tree(samples) for samples in conversations])
    everything = [sample for samples in conversations for sample in samples]
    assert list(row.keys) == [sample.key for sample in everything]
    for ids, positions, sample in zip(
        row.gather(row.input_ids), row.gather(row.position_ids), everything, strict=True
    ):
        assert ids.tolist() == sample.input_ids.tolist()
        assert positions.tolist() == list(range(len(sample)))


@given(st.lists(sample_lists(), min_size=1, max_size=3))
def test_a_token_is_predicted_from_the_one_before_it_in_its_samples(conversations):
    (row,) = pack([build_tree(samples) for samples in conversations])
    for index in row.sample_indices:
        assert row.predicted_from[index].tolist() == [-1, *index[:-1]]


@given(sample_lists())
def test_scatter_is_the_transpose_of_gather(samples):
    (row,) = pack([build_tree(samples)])
    rng = np.random.default_rng(0)
    values = rng.standard_normal(len(row))
    weights = [rng.standard_normal(len(sample)) for sample in samples]
    products = [(w * v).sum() for w, v in zip(weights, row.gather(values), strict=True)]
    assert (row.scatter(weights) * values).sum() == pytest.approx(sum(products))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0]], "must hold 2 arrays, one per sample of the row, got 1"),
        ([torch.ones(2, requires_grad=True)] * 2, "values of sample 'a' must be constants"),
        ([[1.0, 2.0], [1.0]], "sample 'b' must have 2 values, one per token, got the shape .1,"),
        ([0.5, -0.5], r"'a' must have 2 values, .* got the shape \(\); an advantage of the whole"),
    ],
)
def test_scatter_rejects_values_of_other_samples(values, message):
    (row,) = pack([build_tree([Sample([1, 2], [0, 1], "a"), Sample([1, 3], [0, 1], "b")])])
    with pytest.raises(FlexmaskError, match=message):
        row.scatter(values)


def test_gather_takes_tensors_of_any_rank():
    (row,) = pack([build_tree(random_samples(0))])
    values = torch.randn(len(row), 2)
    assert [v.shape[1] for v in row.gather(values)] == [2] * 5


def test_gather_rejects_another_length():
    (row,) = pack([build_tree(random_samples(0))])
    with pytest.raises(FlexmaskError, match="must have 55 entries"):
        row.gather(np.zeros(3))


@given(st.lists(sample_lists(max_samples=8), min_size=1, max_size=4), st.integers(3, 40))
@example([SHARED], 3)
def test_rows_train_every_sample_that_is_not_dropped_once(conversations, max_tokens):
    everything = [sample for samples in conversations for sample in samples]
    kept = [sample for sample in everything if len(sample) <= max_tokens]
    assume(kept)
    policy = "drop" if len(kept) < len(everything) else "split"
    rows = pack([build_tree(samples) for samples in conversations], max_tokens, on_overflow=policy)
    assert all(len(row) <= max_tokens for row in rows)
    assert row_targets(rows) == pytest.approx(npass_targets(kept))
    assert sorted(key for row in rows for key in row.keys) == sorted(s.key for s in kept)


@given(st.lists(sample_lists(max_samples=8), min_size=1, max_size=4), st.integers(1, 40))
@example([SHARED], 3)
@example([[Sample([1, 2, 3, 4], [0, 1, 0, 1]), Sample([1, 2, 3, 5], [0, 0, 0, 1])]], 3)
def test_rows_train_the_first_tokens_of_samples_that_are_truncated(conversations, max_tokens):
    everything = [sample for samples in conversations for sample in samples]
    cut = [Sample(s.input_ids[:max_tokens], s.loss_weights[:max_tokens], s.key) for s in everything]
    pairs = list(zip(everything, cut, strict=True))
    kept = [new for old, new in pairs if len(old) <= max_tokens or new.num_trained]
    assume(kept)
    trees = [build_tree(samples) for samples in conversations]
    rows = pack(trees, max_tokens, on_overflow="truncate")
    assert all(len(row) <= max_tokens for row in rows)
    assert row_targets(rows) == pytest.approx(npass_targets(kept))
    held = [ids.tolist() for row in rows for ids in row.gather(row.input_ids)]
    assert sorted(held) == sorted(sample.input_ids.tolist() for sample in kept)
    assert len(rows.dropped) == len(everything) - len(kept)
    num_cut = sum(len(old) > len(new) for old, new in pairs)
    assert rows.split.truncated_samples == num_cut - len(rows.dropped)


def test_an_overlong_sample_is_an_error_or_dropped_and_listed():
    trees = [
        build_tree([Sample([1, 2], [0, 1], "short"), Sample([1, 3, 4, 5], [0, 0, 1, 1], "long")])
    ]
    with pytest.raises(FlexmaskError, match=r"tree 0, sample 'long': .* = 3 tokens, got 4"):
        pack(trees, 3)
    rows = pack(trees, 3, on_overflow="drop")
    assert rows.dropped == ("long",)
    assert [row.keys for row in rows] == [("short",)]


def test_splitting_can_be_refused():
    tree = build_tree(random_samples(0))
    with pytest.raises(FlexmaskError, match="tree 0: must have at most max_tokens = 40"):
        pack([tree], 40, on_overflow="error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one tree"),
        (([build_tree(random_samples(0))], 0), "max_tokens must be an integer of at least 1"),
        (([build_tree(random_samples(0))], "8"), "max_tokens must be an integer .* got '8'"),
        (([PrefixTree.from_turns([(1, 1, 1)])],), "without tokens cannot be packed"),
    ],
)
def test_rejects_what_cannot_be_packed(arguments, message):
    with pytest.raises(FlexmaskError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PackedRow.from_trees([]), "at least one tree, got none"),
        (lambda: stack_rows([]), "at least one row, got none"),
        (lambda: TreeCollator(pad_to_multiple_of=0), "pad_to_multiple_of must be at least 1"),
        (lambda: TreeCollator()(random_samples(0)), "type Sample is neither .* nor a list of"),
    ],
)
def test_rejects_what_cannot_be_a_batch(call, message):
    with pytest.raises(FlexmaskError, match=message):
        call()


def test_rejects_an_unknown_policy():
    with pytest.raises(FlexmaskError, match="on_overflow must be one of"):
        pack([build_tree(random_samples(0))], on_overflow="keep_start")


def test_a_batch_is_padded_with_tokens_that_see_themselves():
    rows = [pack([build_tree(random_samples(seed, num_samples=seed + 1))])[0] for seed in (0, 1)]
    batch = stack_rows(rows, pad_token_id=9, pad_to_multiple_of=16)
    assert {name: list(t.shape) for name, t in batch.items()} == {
        name: [2, 32]
        for name in (
            *("input_ids", "position_ids", "labels", "shift_labels"),
            *("subtree_end", "sample_counts"),
        )
    }
    assert batch["sample_counts"].dtype == torch.int32
    assert not batch["sample_counts"][0, 11:].any()
    assert batch["subtree_end"].dtype == torch.int32
    assert batch["subtree_end"][0, 11:].tolist() == list(range(12, 33))
    assert (batch["input_ids"][0, 11:] == 9).all()
    assert (batch["shift_labels"][0, 11:] == IGNORE).all()


@given(sample_lists())
def test_sample_counts_are_those_of_the_samples_that_hold_a_token(samples):
    (row,) = pack([build_tree(samples)])
    held = zip(row.gather(row.sample_counts), row.sample_indices, strict=True)
    for counts, index in held:
        holders = [np.isin(index, other) for other in row.sample_indices]
        assert counts.tolist() == np.sum(holders, axis=0).tolist()
    assert row.sample_counts.sum() == sum(map(len, samples))


def test_weights_travel_only_where_they_are_not_uniform():
    samples = random_samples(0)
    assert "loss_weights" not in TreeCollator()([samples])
    batch = TreeCollator(weighting="turn")([samples])
    assert batch["loss_weights"].sum() == pytest.approx(len(samples))


@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
def test_weighting_equals_npass_sums(weighting):
    samples = [Sample([1, 2, 3, 4], [0, 0, 1, 1]), Sample([1, 2, 5], [0, 0, 1])]
    expected = {"token": [1, 1, 1], "turn": [1 / 2, 1 / 2, 1], "conversation": [1 / 3] * 3}
    weighted = weigh_samples(samples, weighting)
    weights = np.concatenate([sample.loss_weights for sample in weighted])
    assert weights[weights > 0].tolist() == pytest.approx(expected[weighting])
    assert row_targets(pack([build_tree(weighted)])) == pytest.approx(npass_targets(weighted))


def test_packing_fills_rows():
    trees = [build_tree(random_samples(seed, num_samples=1 + seed % 4)) for seed in range(40)]
    rows = pack(trees, 64)
    assert sum(len(row) for row in rows) == sum(tree.num_tokens for tree in trees)
    assert len(rows) <= np.ceil(1.2 * sum(tree.num_tokens for tree in trees) / 64)


def test_packing_is_deterministic():
    trees = [build_tree(random_samples(seed)) for seed in range(9)]
    for a, b in zip(pack(trees, 128), pack(trees, 128), strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.subtree_end, b.subtree_end)


def test_the_collator_needs_a_tokenizer_for_conversations():
    with pytest.raises(FlexmaskError, match="needs a tokenizer"):
        TreeCollator()([{"messages": []}])
    with pytest.raises(FlexmaskError, match=r"row that the trainer has tokenised.*trainers\.md"):
        TreeCollator()([{"input_ids": [1, 2], "labels": [1, 2]}])


def test_the_collator_says_where_a_conversation_that_cannot_be_written_stands(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(DATA_PATH.read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tokenizer.chat_template = "{{ raise_exception('no roles like these') }}"
    with pytest.raises(FlexmaskError, match=r"chats.jsonl:1: .*no roles like these"):
        TreeCollator(tokenizer)(list(read_conversations(path)))
