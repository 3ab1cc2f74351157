"""Two processes on CPU train, evaluate and resume as one would by hand; with GPUs the same code."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from command_cases import write_conversations, write_model
from forked import TORCHRUN, launch
from model_cases import tiny_model
from safetensors.torch import load_file
from test_trainers import lora_model
from trainer_cases import (
    CONVERSATIONS,
    assert_same_weights,
    npass_weights,
    parameters,
    train_npass,
    trees,
)

from flexmask import TreeCollator, patch

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples" / "trainers"
ANSWER = {"role": "assistant", "content": "4"}
STOPPED = {"role": "assistant", "content": "4<|im_end|>"}
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", 2)
ACCELERATE += ("--main_process_port", 0)  # any that is free

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "results.pt"
    launch(*TORCHRUN, TESTS / "two_processes.py", path)
    results = torch.load(path)
    for name in ("ddp", "fsdp2"):
        results[name, "adapter"] = load_file(f"{path}-{name}/adapter_model.safetensors")
    return results


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", ["plain", "stock Trainer", "accumulated", "LoRA", "turn"])
def test_three_steps_in_two_processes_equal_npass(results, sharding, case):
    before, theirs = npass_weights("turn" if case == "turn" else "token")
    if case == "LoRA":
        model = lora_model()
        before, theirs = parameters(model), train_npass(model)
    assert_same_weights(results[sharding, case], before, theirs)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_train_each_of_three_conversations_once(results, sharding):
    before, _ = npass_weights()
    theirs = train_npass(tiny_model("llama"), conversations=CONVERSATIONS[:3])
    assert_same_weights(results[sharding, "uneven"], before, theirs)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_a_saved_adapter_is_whole(results, sharding):
    trained = {n: w for n, w in results[sharding, "LoRA"].items() if "lora_" in n}
    saved = results[sharding, "adapter"]
    assert {name.replace(".default", "") for name in trained} == set(saved)
    for name, value in trained.items():
        assert torch.equal(saved[name.replace(".default", "")], value)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_evaluate_each_conversation_once(results, sharding):
    whole = patch(tiny_model("llama"))(**TreeCollator()(trees()[1:])).loss.item()
    assert results[sharding, "logs"][0]["eval_loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_a_log_counts_the_tokens_of_both_processes(results, sharding):
    logged = next(entry for entry in results[sharding, "logs"] if "loss" in entry)
    num_tokens = sum(tree.num_tokens for tree in trees())
    whole = sum(tree.num_sample_tokens for tree in trees())
    assert logged["npass_ratio"] == whole / num_tokens


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_mixed_precision_rounds_neither_loss_weights_nor_their_sum(results, sharding):
    for first, second in zip(*results[sharding, "at the loss"], strict=True):
        assert first[0] == pytest.approx(2, rel=1e-6)
        assert second[0] == pytest.approx(2, rel=1e-6)
        assert first[1] == second[1] == pytest.approx(4, rel=1e-6)


def test_the_stock_trainer_is_refused_where_it_would_round_loss_weights(results):
    assert "loss_weights must be float32" in results["refusal"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model, its tokenizer, and six conversations."""
    folder = write_model(tmp_path_factory.mktemp("files"), with_weights=True)
    write_conversations(folder / "data.jsonl", 6, shortest=True)
    return folder


def options(files, output):
    return (
        *("--model", files, *output),
        *("--max_steps", 6, "--save_steps", 2, "--per_device_train_batch_size", 1),
        *("--learning_rate", 1e-3, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
    )


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same_runs(resumed, whole):
    assert checkpoints(resumed) == checkpoints(whole) == [f"checkpoint-{n}" for n in (2, 4, 6)]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "flexmask" not in (resumed / "config.json").read_text()


@pytest.mark.parametrize("shared", [(), ("--sequence_parallel_size", 2)], ids=["rows", "tokens"])
def test_flexmask_train_survives_the_death_of_a_rank(files, tmp_path, shared):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program = ("flexmask", "train", files / "data.jsonl", *shared)
    launch(*ACCELERATE, "--multi_gpu", "-m", *program, *options(files, ("--output", whole)))
    again = options(files, ("--output", killed, "--resume"))
    said = launch(*TORCHRUN, TESTS / "killed_rank.py", *program, *again, fails=True)
    assert "killed while saving step 4" in said
    assert "holds no checkpoint yet, begins at step 0" in said
    assert checkpoints(killed) == ["checkpoint-2"]
    launch(*TORCHRUN, "-m", *program, *again)
    assert_same_runs(killed, whole)


def test_the_fsdp2_recipe_survives_the_death_of_a_rank(files, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program = (TESTS / "fsdp_on_cpu.py", EXAMPLES / "train.py")
    launch(
        *(*ACCELERATE, "--config_file", EXAMPLES / "fsdp2.yaml", *program),
        *options(files, ("--output_dir", whole, "--data", files / "data.jsonl")),
    )
    again = (
        *options(files, ("--output_dir", killed, "--data", files / "data.jsonl")),
        *("--fsdp", "--fsdp_config", EXAMPLES / "fsdp2.json"),
    )
    said = launch(*TORCHRUN, TESTS / "killed_rank.py", program[1], *again, fails=True)
    assert "killed while saving step 4" in said
    assert checkpoints(killed) == ["checkpoint-2"]
    launch(*TORCHRUN, *program, *again)
    assert (killed / "checkpoint-6" / "pytorch_model_fsdp_0" / "__1_0.distcp").exists()
    assert_same_runs(killed, whole)


@pytest.fixture(scope="module")
def read_together(tmp_path_factory):
    """What two processes read, by rank, and what one alone reads."""
    folder = tmp_path_factory.mktemp("readers")
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, ANSWER]}) for n in range(150)
    ]
    (folder / "good.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    bad = [*lines]
    bad[80] = json.dumps({"messages": [{"role": "user", "content": "?"}, STOPPED]})
    bad[81] = "{"
    (folder / "bad.jsonl").write_text("\n".join(bad))
    whole = gzip.compress("\n".join(bad[82:]).encode())
    (folder / "cut.jsonl.gz").write_bytes(whole[:-20])
    (folder / "own-0.jsonl").write_text("\n".join(lines))
    (folder / "own-1.jsonl").write_text("\n".join(lines[:-1]))
    launch(*TORCHRUN, TESTS / "two_readers.py", folder)
    launch(TESTS / "two_readers.py", folder)
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in (0, 1, "alone")]


def test_two_processes_render_each_conversation_once_and_read_what_one_reads(read_together):
    first, second, alone = read_together
    for case in ((name, how) for name in ("good.jsonl", "bad.jsonl") for how in ("error", "skip")):
        assert first[case][0] == second[case][0] == alone[case][0]
    for case in (("good.jsonl", "error"), ("bad.jsonl", "skip")):
        assert first[case][1] + second[case][1] == alone[case][1] in (149, 150)
        assert abs(first[case][1] - second[case][1]) <= 2
    assert ":81: message 1: the text holds the stop token" in alone["bad.jsonl", "error"][0]


def test_a_file_that_is_damaged_or_another_on_one_rank_is_refused_on_all(read_together):
    first, second, alone = read_together
    assert first["cut"][0] == second["cut"][0] == alone["cut"][0]
    assert "is damaged or was cut short after line" in first["cut"][0]
    for rank in (first, second):
        assert "is not the same file for every process" in rank["other"][0]
