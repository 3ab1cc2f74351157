"""Four processes that share rows two by two train what one process trains."""

from pathlib import Path

import pytest
import torch
from forked import launch, torchrun
from model_cases import tiny_model
from test_trainers import lora_model
from trainer_cases import (
    assert_same_weights,
    difference,
    npass_weights,
    parameters,
    train_npass,
    trees,
)
from two_processes import TOKEN_METRICS, train

from flexmask import FlexmaskError, TreeCollator, patch

RANKS = Path(__file__).parent / "sequence_trainers.py"
SHARDINGS = pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("four") / "results.pt"
    launch(*torchrun(4), RANKS, path)
    return torch.load(path)


@pytest.mark.parametrize(
    ("sharding", "case"),
    [
        ("ddp", "turn, accumulated"),
        ("ddp", "rows of a sampler"),
        ("fsdp2", "turn, accumulated"),
        ("fsdp2", "LoRA, checkpointed"),
    ],
)
def test_three_steps_equal_npass(results, sharding, case):
    before, theirs = npass_weights("turn" if "turn" in case else "token")
    if "LoRA" in case:
        model = lora_model()
        before, theirs = parameters(model), train_npass(model)
    assert_same_weights(results[sharding, case], before, theirs)


def test_experts_with_their_auxiliary_loss_equal_npass(results):
    model = tiny_model("qwen3_moe", output_router_logits=True)
    before = parameters(model)
    assert_same_weights(results["experts"], before, train_npass(model))


def test_bf16_errs_no_more_than_npass_in_bf16(results):
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = train_npass(model)
    _, exact = npass_weights()
    assert difference(results["ddp", "bf16"], exact) <= 2 * difference(rounded, exact)


@SHARDINGS
def test_each_conversation_is_evaluated_once(results, sharding):
    whole = patch(tiny_model("llama"))(**TreeCollator()(trees()[1:])).loss.item()
    assert results[sharding, "logs"][0]["eval_loss"] == pytest.approx(whole, rel=1e-6)


@SHARDINGS
def test_a_log_counts_each_token_once(results, sharding):
    alone = train(tiny_model("llama"), options=TOKEN_METRICS, max_steps=1)
    ours, theirs = (
        next(entry for entry in log if "loss" in entry)
        for log in (results[sharding, "logs"], alone.state.log_history)
    )
    for name in ("npass_ratio", "num_input_tokens_seen", "mean_token_accuracy"):
        assert ours[name] == theirs[name]
    for name in ("loss", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("apart", r"sequence_group must be 2 processes in a row, from 0 on, got \[0, 2\]"),
        ("other batches", "all 2 processes of a sequence_group must be given the same batch"),
        ("metrics", "evaluate with prediction_loss_only, and without compute_metrics"),
    ],
)
def test_what_is_not_exact_is_refused(results, case, message):
    with pytest.raises(FlexmaskError, match=message):
        raise FlexmaskError(results[case])
