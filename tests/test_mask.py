"""The interval mask against the ancestry oracle, and all that is derived from it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import windows
from strategies import forests, segment_trees
from torch.nn.attention.flex_attention import and_masks, create_block_mask

from flexmask import (
    FlexmaskError,
    PrefixTree,
    Sample,
    Segment,
    TreeCollator,
    TreeMask,
    attention,
    build_tree,
    compile_mask,
    pack,
    packed_index,
)
from flexmask.tree.oracle import ancestry


def block_diagonal(blocks):
    size = sum(len(block) for block in blocks)
    dense = np.zeros((size, size), bool)
    at = 0
    for block in blocks:
        dense[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return dense


def tokens_of(tree, segment):
    first = tree.token_starts[segment]
    return range(first, first + tree.lengths[segment])


@given(forests())
def test_interval_mask_equals_ancestry(trees):
    dense = compile_mask(trees).to_dense()[0].numpy()
    np.testing.assert_array_equal(dense, block_diagonal([ancestry(tree) for tree in trees]))


@given(forests())
def test_positions_are_depths(trees):
    mask = compile_mask(trees)
    depths = mask.to_dense()[0].sum(dim=1) - 1
    assert torch.equal(mask.position_ids[0].long(), depths)


@given(forests(), windows())
def test_a_windowed_mask_equals_ancestry_within_positions(trees, limits):
    mask = compile_mask(trees, **limits)
    dense = block_diagonal([ancestry(tree) for tree in trees])
    distance = np.subtract.outer(*[mask.position_ids[0].numpy()] * 2)
    if "window" in limits:
        dense &= distance < limits["window"]
    if "chunk" in limits:
        chunk = mask.position_ids[0].numpy() // limits["chunk"]
        dense &= np.equal.outer(chunk, chunk)
    np.testing.assert_array_equal(mask.to_dense()[0].numpy(), dense)
    assert mask.num_visible == dense.sum()


@given(forests(), windows(), st.integers(1, 9), st.integers(1, 9))
def test_tiles_equal_brute_force(trees, limits, block_q, block_k):
    mask = compile_mask(trees, **limits)
    dense = mask.to_dense()[0].numpy()
    (tiles,) = mask.tiles(block_q, block_k)
    visited, full = np.zeros((2, tiles.num_q_blocks, tiles.num_k_blocks), bool)
    visited[tiles.query, tiles.key] = True
    full[tiles.query, tiles.key] = tiles.is_full
    for i in range(visited.shape[0]):
        for j in range(visited.shape[1]):
            tile = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            assert visited[i, j] == tile.any()
            assert full[i, j] == (tile.shape == (block_q, block_k) and tile.all())
    assert tiles.num_visited == visited.sum()
    assert tiles.num_full == full.sum()


@given(forests())
def test_slices_cover_each_visible_pair_once(trees):
    mask = compile_mask(trees)
    count = np.zeros((mask.shape[1], mask.shape[1]), int)
    for q0, q1, k0, k1, is_causal in mask.slices()[0]:
        square = np.ones((q1 - q0, k1 - k0), int)
        count[q0:q1, k0:k1] += np.tril(square) if is_causal else square
    np.testing.assert_array_equal(count, mask.to_dense()[0].numpy().astype(int))


def test_a_chain_sees_logarithmically_many_prefixes():
    segments = [Segment(1)]
    for index in range(1, 2**10):
        segments.append(Segment(1, (index - 1) // 2))
    (slices,) = compile_mask(PrefixTree.from_segments(segments)).slices()
    per_chain = np.bincount([s.q_start for s in slices])
    assert per_chain.max() <= 10


def assert_block_masks_equal(ours, theirs):
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, table = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        their_counts = getattr(theirs, f"{name}_num_blocks")
        their_table = getattr(theirs, f"{name}_indices")
        assert torch.equal(counts, their_counts)
        assert counts.dtype == table.dtype == torch.int32
        used = torch.arange(table.shape[-1]) < counts[..., None]
        assert torch.equal(table[used], their_table[..., : table.shape[-1]][used])
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.seq_lengths == theirs.seq_lengths
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == theirs.sparsity()


@given(
    st.lists(segment_trees(), min_size=1, max_size=3),
    windows(),
    st.sampled_from([2, 4, 7, 16, 128]),
)
def test_block_mask_equals_create_block_mask(trees, limits, block_size):
    rows = [compile_mask(tree).subtree_end[0] for tree in trees]
    length = max(len(row) for row in rows)
    padding = torch.arange(1, length + 1, dtype=torch.int32)
    ends = torch.stack([torch.cat([row, padding[len(row) :]]) for row in rows])
    mask = TreeMask(ends, **limits)
    theirs = create_block_mask(
        mask.mask_mod, len(rows), 1, length, length, device="cpu", BLOCK_SIZE=block_size
    )
    ours = mask.to_block_mask(block_size)
    assert_block_masks_equal(ours, theirs)
    b, q, k = torch.meshgrid(*map(torch.arange, (len(rows), length, length)), indexing="ij")
    assert torch.equal(ours.mask_mod(b, torch.tensor(0), q, k), mask.to_dense())
    strides = {
        getattr(ours, f"{name}_indices").stride() for name in ("kv", "full_kv", "q", "full_q")
    }
    assert len(strides) == 1, "torch 2.11 walks the full tiles by the strides of the partial ones"


def test_a_mask_joins_a_mask_of_the_user_s_own():
    mask = compile_mask(PrefixTree.from_turns([(8, 16, 8)] * 3), window=24)
    length = mask.shape[1]

    def even(b, h, q, k):
        return k % 2 == 0

    joined = create_block_mask(
        and_masks(mask.mask_mod, even), 1, None, length, length, device="cpu", BLOCK_SIZE=16
    )
    q, k = torch.arange(length)[:, None], torch.arange(length)
    found = joined.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    assert torch.equal(found, mask.to_dense()[0] & (k % 2 == 0))


def test_a_windowed_mask_keeps_its_window_and_says_so():
    mask = compile_mask(PrefixTree.from_turns([(2, 2, 2)]), window=3, chunk=1000)
    assert (mask.to("cpu").window, mask.to("cpu").chunk) == (3, 1000)
    assert repr(mask) == "TreeMask(rows=1, tokens=6, window=3, chunk=1,000, visible=15)"
    with pytest.raises(
        FlexmaskError, match=r"slices cover a mask without window and chunk, got Tr"
    ):
        mask.slices()
    for limits in ({"window": 0}, {"chunk": -1}, {"window": 1.5}, {"chunk": "8"}):
        with pytest.raises(
            FlexmaskError, match=r"must be an integer of at least 1, got .*; leave it out"
        ):
            TreeMask([2, 2], **limits)


def test_a_mask_does_not_change_with_the_array_that_it_was_made_of():
    end = np.array([2, 2], np.int32)
    mask = TreeMask(end)
    end[:] = 0
    assert mask.subtree_end.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("turns", "density"),
    [
        ([(60, 300, 120)] * 8, 0.814),
        ([(60, 300, 120)] * 16, 0.876),
        ([(30, 300, 40)] * 16, 0.761),
        ([(50, 500, 150)] * 32, 0.938),
        ([(200, 1500, 300)] * 16, 0.953),
    ],
)
def test_heavy_first_rows_are_dense(turns, density):
    assert compile_mask(PrefixTree.from_turns(turns)).density() >= density


@pytest.mark.parametrize(
    ("subtree_end", "message"),
    [
        ([2, 3, 3], r"subtree_end\[0\] = 2|crosses"),
        ([3, 1, 3], r"subtree_end\[1\] must be in \[2, 3\], got 1"),
        ([4, 2, 3], r"subtree_end\[0\] must be in \[1, 3\], got 4"),
        ([], r"must be \[B, L\] or \[L\] and not empty"),
        ([1.0], "must hold integers"),
    ],
)
def test_rejects_ends_that_are_no_forest(subtree_end, message):
    with pytest.raises(FlexmaskError, match=message):
        TreeMask(subtree_end)


def test_rejects_positions_of_another_shape():
    with pytest.raises(FlexmaskError, match=r"shape of subtree_end, \[1, 2\], got \[1, 3\]"):
        TreeMask([2, 2], [0, 1, 2])


@given(forests(), st.data())
def test_rejects_positions_that_are_no_depths(trees, data):
    mask = compile_mask(trees)
    positions = mask.position_ids[0].clone()
    q = data.draw(st.integers(0, len(positions) - 1))
    depth = int(positions[q])
    positions[q] = data.draw(st.integers(0, 99).filter(lambda value: value != depth))
    if depth == 0 and mask.subtree_end[0, q] == q + 1:
        TreeMask(mask.subtree_end, positions)  # alone, as padding is
        return
    with pytest.raises(FlexmaskError, match=rf"position_ids\[{q}\] must be {depth}, the number of"):
        TreeMask(mask.subtree_end, positions)


@pytest.mark.parametrize(
    ("given_trees", "message"),
    [
        ([], "at least one tree"),
        (None, "compile_mask takes a list of PrefixTree, got NoneType"),
        ([[1, 2]], "tree 0 must be a PrefixTree, got list; make trees with build_tree"),
    ],
)
def test_rejects_what_are_no_trees(given_trees, message):
    with pytest.raises(FlexmaskError, match=message):
        compile_mask(given_trees)


@given(forests())
def test_tokens_placed_by_packed_index_see_their_ancestors(trees):
    index = packed_index(trees)
    own_order = compile_mask(trees).to_dense()[0].numpy()[np.ix_(index, index)]
    stop = 0
    for tree in trees:
        for segment, length in enumerate(tree.lengths.tolist()):
            first = stop + tree.token_starts[segment]
            path = [stop + t for s in tree.path(segment)[:-1] for t in tokens_of(tree, s)]
            for token in range(first, first + length):
                assert np.flatnonzero(own_order[token]).tolist() == sorted(
                    [*path, *range(first, token + 1)]
                )
        stop += tree.num_tokens
    assert stop == len(index)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_tree(Sample([1], [0])), "build_tree takes a list of Sample, got Sample"),
        (lambda: PrefixTree.from_turns((5, 10, 2)), r"turn 0: must be \(.*\) lengths, .* got \(5,"),
        (
            lambda: TreeMask([2, 2]).to_block_mask((64, 64)),
            r"sizes must be integers .* got \(64, 6",
        ),
        (lambda: build_tree([[1, 2]]), r"sample 0: must be a Sample\(.*\), got list"),
        (lambda: pack(build_tree([Sample([1], [0])])), "pack takes a list of PrefixTree, got Pref"),
        (lambda: PrefixTree.from_segments([5]), r"segment 0: must be a Segment\(.*\), got int"),
        (lambda: attention(*[torch.ones(1, 1, 2, 4)] * 3, torch.ones(1, 2)), "must be a TreeMask"),
        (lambda: attention(*[np.ones((1, 1, 2, 4))] * 3, TreeMask([2, 2])), "q must be a torch.Te"),
        (lambda: TreeCollator("Qwen/Qwen3-4B"), "a Hugging Face tokenizer, got the name 'Qwen"),
        (lambda: TreeCollator(weighting="word"), "weighting must be one of .* got 'word'"),
    ],
)
def test_things_of_another_kind_are_refused_by_their_name(make, message):
    with pytest.raises(FlexmaskError, match=message):
        make()


def test_a_mask_draws_itself():
    assert str(TreeMask([3, 2, 3])).splitlines() == [
        "TreeMask(rows=1, tokens=3, visible=5), tiles of 1",
        "█··",
        "██·",
        "█·█",
    ]
    assert str(TreeMask([3, 3, 3], window=2)).splitlines()[1:] == ["█··", "██·", "·██"]
