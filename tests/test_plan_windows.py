"""What `flexmask plan` counts for layers with windows and chunks, against the dense mask."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from backend_cases import within_window
from chat_cases import chat_case
from command_cases import run, write_conversations, write_model
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import windows
from model_cases import WINDOW, tiny_model
from strategies import segment_trees
from transformers import AutoTokenizer

from flexmask import PrefixTree, Segment, compile_mask, render_samples
from flexmask.data.renderer import Renderer
from flexmask.demo import TOKENIZER_PATH
from flexmask.model import work
from flexmask.model.cost import CostModel
from flexmask.model.load import meta_model
from flexmask.model.windows import FULL, Window
from flexmask.model.work import npass_tiled, npass_work, single_pass_tiled, single_pass_work
from flexmask.tools.plan.estimate import estimate
from flexmask.tools.plan.report import estimate_text
from flexmask.tools.plan.survey import make_plan
from flexmask.training.data import make_batch_sampler
from flexmask.training.options import TrainConfig
from flexmask.tree.build import build_tree

BLOCK = 4  # tokens on a side of a tile, in place of 128


def visible_tiles(dense):
    """How many tiles of BLOCK x BLOCK hold a visible pair."""
    blocks = range(0, len(dense), BLOCK)
    return sum(bool(dense[i : i + BLOCK, j : j + BLOCK].any()) for i in blocks for j in blocks)


@given(tree=segment_trees(), window=windows().map(lambda options: Window(**options)))
def test_pairs_of_a_tree_equal_the_dense_mask(tree, window):
    counted = single_pass_work(tree, [window])
    mask = compile_mask(tree)
    assert counted.pairs(window) == within_window(mask, **window._asdict()).sum()
    assert counted.pairs(FULL) == mask.num_visible


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    window=windows().map(lambda options: Window(**options)),
)
def test_pairs_and_tiles_of_npass_equal_the_dense_masks(lengths, window):
    masks = [compile_mask(PrefixTree.from_segments([Segment(length)])) for length in lengths]
    dense = [within_window(mask, **window._asdict())[0] for mask in masks]
    with mock.patch.object(work, "TILE", BLOCK):
        tiled = npass_tiled(lengths, [window])
    assert npass_work(lengths, [window]).pairs(window) == sum(int(x.sum()) for x in dense)
    assert tiled.pairs(window) == sum(map(visible_tiles, dense)) * BLOCK**2
    assert tiled.num_tokens == sum(lengths)


@given(tree=segment_trees(), window=windows().map(lambda options: Window(**options)))
def test_tiles_of_a_tree_are_those_that_kernels_visit(tree, window):
    mask = compile_mask(tree)
    dense = within_window(mask, **window._asdict())[0]
    with mock.patch.object(work, "TILE", BLOCK):
        tiled = single_pass_tiled(tree, [window])
    assert tiled.pairs(FULL) == visible_tiles(mask.to_dense()[0]) * BLOCK**2
    assert tiled.pairs(window) == visible_tiles(dense) * BLOCK**2


@pytest.mark.parametrize("family", ["gemma2", "llama4_text", "mistral", "llama"])
def test_operations_are_those_of_each_layer_by_itself(family):
    model = tiny_model(family)
    cost = CostModel.of(model)
    messages, _ = chat_case("thinking")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tree = build_tree(render_samples(messages, tokenizer))
    counted = single_pass_work(tree, cost.windows)
    kinds = {
        "gemma2": [{"window": WINDOW}, {}],
        "llama4_text": [{"chunk": 7}, {}],
        "mistral": [{"window": WINDOW}] * 2,
        "llama": [{}, {}],
    }
    pairs = sum(int(within_window(compile_mask(tree), **kind).sum()) for kind in kinds[family])
    width = 4 * 8  # of the heads of a layer
    linear = 6 * (cost.linear + cost.head) * tree.num_tokens
    assert cost.flops(counted) == linear + 12 * width * pairs


def test_batches_of_a_windowed_model_are_balanced_by_what_it_sees():
    """A long conversation and a short one: with the window, many short ones outweigh the long."""
    trees = [PrefixTree.from_segments([Segment(length)]) for length in [400, *[50] * 40]]
    cost = CostModel.of(tiny_model("mistral"))
    sampler = make_batch_sampler(
        TrainConfig("model", ["data"], "output", max_tokens=400, rows_per_batch=1),
        SimpleNamespace(world_size=2, seed=0, data_seed=None, process_index=1),
        trees,
        tiny_model("mistral"),
    )
    costs = [sum(cost.tree_cost(trees[i]) for i in batch) for batch in sampler.plan().batches]
    assert sampler.plan().costs.ravel().tolist() == pytest.approx(costs)
    pairs = 400 * WINDOW - WINDOW * (WINDOW - 1) // 2
    width = 12 * sum(cost.widths.values())
    assert cost.tree_cost(trees[0]) == 400 + width * pairs / (6 * (cost.linear + cost.head))


def test_the_estimate_says_what_layers_with_a_window_see(tmp_path):
    data = write_conversations(tmp_path / "data.jsonl", 3)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    cost = CostModel.of(model := tiny_model("gemma2"))
    plan = make_plan([data], Renderer(tokenizer), windows=cost.windows)
    guess = estimate(plan, meta_model(model.config, torch.float32))
    (kind,) = guess.bounded_layers
    assert (kind.window, kind.chunk, kind.layers) == (WINDOW, None, 1)
    assert kind.npass_visible_pairs == plan.npass.work.bounded[Window(WINDOW)]
    assert kind.npass_visible_pairs < plan.npass.work.num_pairs
    assert kind.single_pass_tiles < plan.single_pass.num_tiles()
    assert (
        f"window of 4 in 1 layer           {kind.npass_visible_pairs:,} visible pairs N-pass"
    ) in estimate_text(guess)
    assert guess.speed_up == cost.speed_up(plan.npass.work, plan.single_pass.work)


def test_the_command_counts_the_windows_of_its_model(tmp_path, capsys):
    data = write_conversations(tmp_path / "data.jsonl", 2, shortest=True)
    settings = {"num_hidden_layers": 2, "sliding_window": 64, "use_sliding_window": True}
    layers = ["sliding_attention", "full_attention"]
    model = write_model(tmp_path / "model", layer_types=layers, **settings)
    run("plan", data, "--tokenizer", model, "--model", model, "--measure", 1, "--json")
    report = json.loads(capsys.readouterr().out)
    (kind,) = report["estimate"]["bounded_layers"]
    assert (kind["window"], kind["layers"]) == (64, 1)
    assert kind["single_pass_visible_pairs"] < report["single_pass_visible_pairs"]
    assert kind["npass_visible_pairs"] < 64 * report["npass_tokens"]
    assert report["measured"]["predicted_speed_up"]["npass"] > 1
