"""What is said of 64 ranks and rows of a million tokens: counts, shards, simulation."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flexmask_kernels.configs import default_config
from hypothesis import given
from hypothesis import strategies as st
from model_cases import tiny_model
from strategies import forests
from transformers import LlamaConfig

from benchmarks import scaling
from flexmask import FlexmaskError, TreeMask, compile_mask
from flexmask.backends.flex_tables import tables_from_ranges
from flexmask.tools.plan.memory import saved_bytes
from flexmask.tools.plan.ranks import idle_share, pack_by_cost, pack_by_tokens
from flexmask.tools.plan.scaling import (
    _TRITON_TILE,
    RowMemory,
    devices_needed,
    longest_row,
    mask_bytes,
)
from flexmask.tools.plan.sharding import count_pairs, count_remote, divide_row, shard_row

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"


def mask_of(trees):
    mask = compile_mask(trees)
    return mask.subtree_end[0].numpy(), mask.position_ids[0].numpy(), mask.to_dense()[0].numpy()


@given(forests(), st.data())
def test_a_shard_sees_its_own_forest_and_the_ancestors_of_its_first_token(trees, data):
    end, positions, dense = mask_of(trees)
    start = data.draw(st.integers(0, end.size - 1))
    stop = data.draw(st.integers(start + 1, end.size))
    shard = shard_row(end, start, stop)
    assert shard.remote_keys.size == positions[start]
    seen = np.zeros((stop - start, end.size), bool)
    seen[:, start:stop] = TreeMask(shard.local_end).to_dense()[0].numpy()
    seen[:, shard.remote_keys] = np.arange(stop - start)[:, None] < shard.remote_end
    assert (seen == dense[start:stop]).all()


@given(forests(), st.sampled_from(["contiguous", "zigzag", "balanced"]))
def test_devices_hold_every_block_once_and_fetch_what_they_see(trees, division):
    end, positions, _ = mask_of(trees)
    missing = -end.size % 12  # padding, as rows have it: 2 devices, blocks of 3
    end = np.append(end, np.arange(end.size + 1, end.size + missing + 1))
    positions = np.append(positions, np.zeros(missing, np.int64))
    dense = TreeMask(end).to_dense()[0].numpy()
    blocks_of = divide_row(positions, 2, 3, division)
    assert sorted(np.concatenate(blocks_of)) == list(range(end.size // 3))
    assert len({len(blocks) for blocks in blocks_of}) == 1
    assert count_pairs(positions, 3).tolist() == [
        int(dense[i : i + 3].sum()) for i in range(0, end.size, 3)
    ]
    for blocks in blocks_of:
        own = (blocks[:, None] * 3 + np.arange(3)).ravel()
        outside = np.delete(dense[own].any(0), own)
        assert count_remote(end, blocks, 3) == outside.sum()


def test_zigzag_balances_a_causal_row():
    positions = np.arange(64)
    loads = [count_pairs(positions, 4)[b].sum() for b in divide_row(positions, 4, 4, "zigzag")]
    assert len(set(loads)) == 1


def test_rejects_a_row_that_does_not_divide():
    with pytest.raises(FlexmaskError, match=r"multiple of 16 tokens .*, got 40; pad it"):
        divide_row(np.arange(40), 4, 2, "zigzag")
    with pytest.raises(FlexmaskError, match=r"division must be one of .*, got 'even'"):
        divide_row(np.arange(16), 4, 2, "even")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 90))
def test_rows_hold_every_conversation_once_within_the_budget(sizes, capacity):
    num_tokens = np.array(sizes)
    costs = num_tokens**2.0
    for rows in (
        pack_by_tokens(num_tokens, capacity),
        pack_by_cost(num_tokens, costs, capacity),
    ):
        assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
        assert max(num_tokens[row].sum() for row in rows) <= capacity


def test_filling_by_cost_evens_rows_out():
    rng = np.random.default_rng(0)
    num_tokens = rng.integers(5, 60, 300)
    costs = num_tokens + num_tokens**2 / 20

    def spread(rows):
        loads = np.array([costs[row].sum() for row in rows])
        return loads.max() / loads.mean()

    by_tokens = spread(pack_by_tokens(num_tokens, 240))
    assert spread(pack_by_cost(num_tokens, costs, 240)) < by_tokens


def test_rejects_a_conversation_that_fits_in_no_row():
    with pytest.raises(FlexmaskError, match="at most 10 tokens, got 11; split them first"):
        pack_by_tokens(np.array([3, 11]), 10)


@pytest.mark.parametrize(
    ("by_cost", "sync", "elapsed"),
    [
        (False, "row", 9 + 7),  # 1 against 9, then 3 against 7
        (False, "step", 9 + 7),
        (True, "row", 9 + 3),  # 9 against 7, then 3 against 1
        (True, "step", 9 + 1),  # and 7 + 3
    ],
)
def test_waiting_by_hand(by_cost, sync, elapsed):
    costs = np.array([1.0, 9.0, 3.0, 7.0])
    idle = idle_share(costs, 2, 2, by_cost=by_cost, sync=sync)
    assert idle == pytest.approx(1 - 20 / (2 * elapsed))


@given(st.lists(st.integers(1, 99), min_size=24, max_size=40))
def test_dealing_by_cost_never_waits_longer_at_each_row(costs):
    rows = np.array(costs, float)
    as_they_come, dealt = (
        idle_share(rows, 4, 3, by_cost=by_cost, sync="row") for by_cost in (False, True)
    )
    assert 0 <= dealt <= as_they_come + 1e-12


def test_rejects_less_than_a_step():
    with pytest.raises(FlexmaskError, match="a step needs 8 rows, got 7"):
        idle_share(np.ones(7), 4, 2, by_cost=True, sync="row")


@given(forests(max_segments=8, max_length=90))
def test_bytes_of_masks_are_those_of_the_real_ones(trees):
    mask = compile_mask(trees)
    sizes = mask_bytes(mask.subtree_end[0].numpy())
    assert sizes["subtree_end"] == mask.subtree_end.untyped_storage().nbytes()
    assert sizes["dense"] == mask.to_dense().numel()
    if mask.shape[1] > 128:  # one block is padded to two
        tables = tables_from_ranges(mask.subtree_end)
        assert sizes["flex_tables"] == sum(t.numel() * t.element_size() for t in tables)


@pytest.mark.parametrize("capability", [90, 100])
def test_lists_are_counted_in_the_tiles_of_the_kernels(capability):
    config = default_config("forward", capability, 128, 2)
    assert (config.block_q, config.block_k) == _TRITON_TILE


def test_activations_of_a_layer_are_those_of_a_real_model():
    config = tiny_model("llama", hidden_size=64, num_hidden_layers=3).config
    memory = RowMemory.of(config)

    def kept(num_layers):
        model = tiny_model("llama", hidden_size=64, num_hidden_layers=num_layers).bfloat16()
        model.set_attn_implementation("sdpa")
        ids = torch.zeros(1, 128, dtype=torch.int64)
        return saved_bytes(model, lambda: model(input_ids=ids, use_cache=False).logits.sum()) / 128

    assert memory.layer == pytest.approx(kept(2) - kept(1), rel=0.1)
    assert memory.state == 16 * sum(
        p.numel() for p in tiny_model("llama", hidden_size=64, num_hidden_layers=3).parameters()
    )


def test_each_way_to_train_takes_less():
    ways = list(RowMemory.of(LlamaConfig(num_hidden_layers=2)).ways().values())
    assert ways == sorted(ways, reverse=True)


@pytest.mark.parametrize(
    ("num_tokens", "longest", "devices"), [(10, 10, 1), (11, 10, 2), (1, 0, None)]
)
def test_devices_of_a_row(num_tokens, longest, devices):
    assert devices_needed(num_tokens, longest) == devices


def test_the_longest_row_fills_what_state_and_reserve_leave():
    assert longest_row(10.0, state=400, num_ranks=4, device_bytes=1000, reserve=99) == 80
    assert longest_row(10.0, state=4000, num_ranks=4, device_bytes=1000, reserve=99) == 0


def with_tables(text):
    """The page with the tables of the recorded run between its marks."""
    record = json.loads((ROOT / "benchmarks" / "results" / "scaling-cpu.json").read_text())
    for table in scaling.tables(record):
        mark = f"<!-- table: {table.heading} -->"
        assert text.count(mark) == 1, table.heading
        pattern = re.compile(re.escape(mark) + r"\n.*?<!-- end -->", re.DOTALL)
        text = pattern.sub(lambda _, m=mark, t=table: f"{m}\n{t}\n<!-- end -->", text)
    return text


def test_the_docs_table_of_scaling_is_that_of_the_record():
    text = DOCUMENT.read_text()
    if os.environ.get("FLEXMASK_WRITE_DOCS"):
        DOCUMENT.write_text(with_tables(text))
    assert DOCUMENT.read_text() == with_tables(text)
