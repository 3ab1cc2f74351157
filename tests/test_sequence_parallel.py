"""Processes that share the tokens of a row compute what one process computes."""

import json
from pathlib import Path

import pytest
import torch
from command_cases import write_conversations, write_model
from forked import launch, torchrun
from model_cases import tiny_model
from sequence_ranks import CASES

from flexmask import FlexmaskError, patch
from flexmask.model.sequence_group import Heads

RANKS = Path(__file__).parent / "sequence_ranks.py"

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "results.pt"
    launch(*torchrun(request.param), RANKS, path)
    return torch.load(path)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_separate_sequences(results, case):
    assert max(results[case]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_fp64_agrees_to_ten_digits(results, case):
    assert max(results[case, "fp64"]) < 1e-10


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_auxiliary_loss_of_experts_is_that_of_whole_rows(results, family):
    assert max(results[family, "auxiliary"]) < 1e-5


def test_layers_may_be_computed_again_in_the_backward_pass(results):
    assert max(results["checkpointed"]) < 1e-5


def test_a_model_may_be_compiled_whole(results):
    if "compiled" in results:  # which takes longest, and is done by two
        assert max(results["compiled"]) < 1e-5


def test_shards_in_a_wrong_order_fail_by_a_hundred_times(results):
    assert min(results["reversed"]) > 1e-3


def test_loss_weights_are_divided_by_those_of_the_whole_row(results):
    alone, *shared = results["weights"]
    assert shared == pytest.approx([alone, alone], rel=1e-6)


@pytest.mark.parametrize("case", ["kept", "kept, 3 heads"])
def test_the_plan_predicts_what_each_process_keeps(results, case):
    predicted, found = results[case]
    assert predicted == pytest.approx(found, rel=0.15)


def test_flexmask_verify_proves_rows_that_are_shared(tmp_path):
    files = write_model(tmp_path / "model")
    data = write_conversations(tmp_path / "data.jsonl", 2, shortest=True)
    report = tmp_path / "report.json"
    launch(
        *(*torchrun(2), "-m", "flexmask", "verify", data, "--model", files, "--from_config"),
        *("--sequence_parallel_size", 2, "--device", "cpu", "--json", report),
    )
    found = json.loads(report.read_text())
    assert found["proved"]
    assert found["checked"]["rows"] == "shared by 2 processes"


def test_ordinary_batches_run_as_before(results):
    assert results["ordinary"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "too short",
            r"must have a multiple of \d tokens, got \d; pad them, TreeCollator\(pad_to_",
        ),
        ("other", r"must be given the same batch, but number \d has another than number 0"),
        ("mixers", "'lfm2' takes no sequence_group: its Lfm2ShortConv looks along the sequence"),
        ("loss", "the loss function of LlamaForCausalLM must be ForCausalLMLoss with a sequence_g"),
        ("fused", "LlamaForCausalLM computed its loss by a fused one, of a part of the row; turn"),
    ],
)
def test_what_is_not_exact_is_refused(results, case, message):
    with pytest.raises(FlexmaskError, match=message):
        raise FlexmaskError(results["refused"][case])


def test_a_group_that_is_none_is_refused():
    with pytest.raises(FlexmaskError, match=r"sequence_group must be a process group .*, got 'sp'"):
        patch(tiny_model("llama"), sequence_group="sp")


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(4, 4), (3, 3), (14, 2), (3, 1), (6, 3), (8, 1), (64, 8)])
def test_query_heads_keep_their_key_heads_on_every_rank(shape, size):
    num_heads, num_keys = shape
    heads = Heads.of(num_heads, num_keys, size)
    queries = torch.arange(1, num_heads + 1)[None]  # 0 is padding
    keys = heads.pad_keys(torch.arange(1, num_keys + 1)[None])
    spread = heads.pad_queries(queries)
    assert spread.shape[1] % size == keys.shape[1] % size == 0
    assert torch.equal(heads.drop_padding(spread), queries)
    for own, theirs in zip(spread.chunk(size, 1), keys.chunk(size, 1), strict=True):
        own = own.view(theirs.shape[1], -1)
        group = num_heads // num_keys
        is_own = (own - 1) // group == theirs.view(-1, 1) - 1
        assert (is_own | (own == 0)).all()
