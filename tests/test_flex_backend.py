"""FlexAttention's block tables, and its forward pass on the CPU (it has no backward there)."""

import copy
from collections import Counter
from functools import cache, wraps

import pytest
import torch
from backend_cases import (
    mask_from_depths,
    random_inputs,
    stack,
    windowed,
    within_window,
    worst_ratio,
)
from hypothesis import given
from hypothesis.strategies import sampled_from
from mask_strategies import masks, windows
from model_cases import npass, packed, tiny_model
from strategies import random_samples
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexmask import PrefixTree, attention, compile_mask, patch
from flexmask.backends import api, flex, flex_tables
from flexmask.backends.api import dispatch
from flexmask.backends.flex import kept_graphs
from flexmask.errors import UnsupportedModelError

MASKS = [
    compile_mask(PrefixTree.from_turns([(30, 60, 50)] * 6)),
    compile_mask(PrefixTree.from_turns([(100, 60, 70)] * 3)),
    compile_mask([PrefixTree.from_turns([(60, 60, 70)] * 3)] * 2),
]


def tiles_in(counts, indices):
    """bool [B, N, M]: the tiles that an index table lists, by its own line and column."""
    B, _, N, M = indices.shape
    grid = torch.zeros(B, N, M, dtype=torch.bool)
    for b in range(B):
        for line in range(N):
            grid[b, line, indices[b, 0, line, : counts[b, 0, line]].long()] = True
    return grid


def grids(tables):
    """Partial and full tiles [B, N, M] by query and key block, from both orders of the tables."""
    kv, full_kv, q, full_q = (tiles_in(*tables[i : i + 2]) for i in range(0, 8, 2))
    assert torch.equal(kv, q.transpose(1, 2))
    assert torch.equal(full_kv, full_q.transpose(1, 2))
    return kv, full_kv


def tile_classes(dense, block_q, block_k):
    """Whether any, and whether all pairs of each tile are visible; ragged tiles are never full."""
    L = dense.shape[1]
    padded = torch.nn.functional.pad(dense, (0, -L % block_k, 0, -L % block_q))
    tiles = padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q))  # [B, N, q, M, k]
    return tiles.any(4).any(2), tiles.all(4).all(2)


@given(mask=masks(), limits=windows(), block=sampled_from([(4, 4), (8, 4), (2, 6)]))
def test_both_builders_find_exactly_the_visible_tiles(mask, limits, block):
    start = windowed(mask, **limits).window_start
    tiles = flex_tables.tables_from_tiles(mask.subtree_end, start, block=block)
    grid = flex_tables.tables_from_grid(mask.subtree_end, start, block=block)
    visited, full = tile_classes(within_window(mask, **limits), *block)
    for tables in (tiles, grid):
        partial, is_full = grids(tables)
        assert torch.equal(partial, visited & ~full)
        assert torch.equal(is_full, full)


def test_tables_are_built_once_for_a_mask_and_its_views():
    rows = torch.stack([MASKS[0].subtree_end, MASKS[0].position_ids], 2)  # [1, L, 2]
    first = flex_tables.block_tables(rows[:, :, 0], None)
    assert flex_tables.block_tables(rows[:, :, 0], None) is first
    rows[:, :, 0] = torch.arange(1, rows.shape[1] + 1)
    assert flex_tables.block_tables(rows[:, :, 0], None) is not first


def errors(mask, batch=None, **options):
    """The worst ratio of a forward pass, eager; `batch` rows of tensors share a mask of one."""
    q, k, v, _ = random_inputs(
        stack([mask] * batch) if batch else mask, width=16, value_width=16, dtype=torch.float32
    )
    out = attention(q, k, v, mask, backend="flex", **options)
    exact = attention(q.double(), k.double(), v.double(), mask, backend="reference", **options)
    return worst_ratio([out], [exact])


def test_forward_equals_reference_and_new_masks_do_not_compile_again():
    torch._dynamo.reset()
    counters.clear()
    for mask in MASKS:
        assert errors(mask) < 1
    assert errors(stack(MASKS)) < 1
    assert errors(MASKS[0], batch=2) < 1
    assert counters["stats"]["unique_graphs"] <= 2


def test_rows_of_whole_blocks_share_a_graph_that_knows_it(monkeypatch):
    known = []

    def keep(graph, inputs):
        rows = [x for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4]
        known.append(statically_known_true(rows[0].shape[2] % flex_tables.BLOCK == 0))
        return graph

    compiled = torch.compile(flex._attend, dynamic=True, fullgraph=True, backend=keep)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for length in (300, 256, 384, 380):
        assert errors(mask_from_depths([*range(length)])) < 1
    assert known == [False, True]


def test_softcap_and_window_equal_reference():
    assert errors(MASKS[0], softcap=1.5, window=70) < 1


def test_chunk_equals_reference():
    assert errors(MASKS[0], chunk=50) < 1


def test_compiles_as_one_graph_from_the_mask_tensor():
    mask = MASKS[1]
    q, k, v, _ = random_inputs(mask, width=16, value_width=16, dtype=torch.bfloat16)

    @torch.compile(fullgraph=True)
    def function(q, k, v, subtree_end):
        return dispatch(q, k, v, subtree_end, window=90, backend="flex")

    exact = attention(q.double(), k.double(), v.double(), mask, window=90, backend="reference")
    ours = function(q, k, v, mask.subtree_end)
    assert worst_ratio([ours], [exact]) < 1


def test_refuses_what_it_cannot_do_on_the_cpu():
    mask = mask_from_depths([0, 1, 1])
    q, k, v, _ = random_inputs(mask, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"no backward pass on the CPU; use.*'cpu'"):
        attention(q.requires_grad_(), k, v, mask, backend="flex")
    with pytest.raises(UnsupportedModelError, match=r"no sinks on the CPU; use backend='cpu'"):
        attention(q.detach(), k, v, mask, sinks=torch.zeros(4), backend="flex")
    with pytest.raises(UnsupportedModelError, match=r"got fp64; use backend='reference'"):
        attention(q.double(), k.double(), v.double(), mask, backend="flex")


@pytest.fixture
def builds(monkeypatch):
    """How often window starts and tables were made, by the name of what makes them."""
    counts = Counter()

    def counted(function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            counts[function.__name__] += 1
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((flex_tables, "tables_from_tiles"), (api, "find_window_start")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return counts


FOUR_LAYERS = {
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0] * 2,
    },
}


@pytest.mark.parametrize("family", FOUR_LAYERS)
def test_models_with_windows_chunks_and_softcaps_build_tables_once_and_equal_separate_sequences(
    family, builds
):
    model = tiny_model(family, num_hidden_layers=4, **FOUR_LAYERS[family])
    samples = random_samples(1)
    theirs = npass(copy.deepcopy(model), samples)
    row, batch = packed(samples)
    patch(model, backend="flex")
    for num_passes in (1, 2):
        with torch.no_grad():
            logits = row.gather(model(**batch).logits[0])
        # of two kinds of layers, for a mask that is the same in both passes
        assert builds == {"tables_from_tiles": 2, "find_window_start": 1}, num_passes
    errors = [(a - b).abs().max().item() for a, b in zip(logits, theirs[0], strict=True)]
    assert max(errors) < 1e-5


def test_gradients_of_a_kept_graph_may_be_asked_for_twice(monkeypatch):
    def stand_in(x, w):  # keeps what it computes, as FlexAttention's logsumexp, for the gradients
        return ((x @ w).sigmoid() @ w).sigmoid() @ w

    monkeypatch.setattr(flex, "_attend", stand_in)
    monkeypatch.setattr(flex, "_compiled", cache(flex._compiled.__wrapped__))
    x, w = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    out = flex._attend_eagerly(x, w)
    with kept_graphs():
        first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first, torch.autograd.grad(stand_in(x, w).sum(), x))
