"""Two processes on CPU train, evaluate and resume as one would by hand; with GPUs the same code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import tiny_model
from test_trainers import lora_model
from trainer_cases import assert_same_weights, npass_weights, parameters, train_npass, trees

from flexmask import TreeCollator, patch

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def launch(*command):
    """What a command of this Python said, after it ended well."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "results.pt"
    launch(*TORCHRUN, TESTS / "two_processes.py", path)
    return torch.load(path)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", ["plain", "stock Trainer", "accumulated", "LoRA", "turn"])
def test_three_steps_in_two_processes_equal_npass(results, sharding, case):
    before, theirs = npass_weights("turn" if case == "turn" else "token")
    if case == "LoRA":
        model = lora_model()
        before, theirs = parameters(model), train_npass(model)
    assert_same_weights(results[sharding, case], before, theirs)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_evaluate_each_conversation_once(results, sharding):
    whole = patch(tiny_model("llama"))(**TreeCollator()(trees()[1:])).loss.item()
    assert results[sharding, "eval_loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_mixed_precision_rounds_neither_loss_weights_nor_their_sum(results, sharding):
    for first, second in zip(*results[sharding, "at the loss"], strict=True):
        assert first[0] == pytest.approx(2, rel=1e-6)
        assert second[0] == pytest.approx(2, rel=1e-6)
        assert first[1] == second[1] == pytest.approx(4, rel=1e-6)


def test_the_stock_trainer_is_refused_where_it_would_round_loss_weights(results):
    assert "loss_weights must be float32" in results["refusal"]
