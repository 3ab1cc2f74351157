"""`flexmask train` from files to files, and what it says about bad input."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from command_cases import run, write_conversations, write_model
from forked import TORCHRUN, launch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TrainingArguments,
)

from flexmask import TreeCollator, patch
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import DataError
from flexmask.files import LOCK, only_run
from flexmask.tools.train.command import _is_main
from flexmask.training.checkpoints import checkpoint_errors
from flexmask.training.run import draw_training
from flexmask.training.trainer import LogEnds


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data") / "conversations.jsonl", 8)


def train(model_dir, data, output, *others):
    return run(
        *("train", data, "--model", model_dir, "--output", output, "--from_config"),
        *("--use_cpu", "--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1),
        *("--disable_tqdm", "true", *others),
    )


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_a_run_leaves_a_model_that_loads(model_dir, data, tmp_path):
    output = tmp_path / "run"
    options = ("--eval_split", 0.25, "--eval_strategy", "epoch", "--logging_steps", 10)
    options += ("--per_device_train_batch_size", 4, "--gradient_checkpointing")  # two in an epoch
    assert train(model_dir, data, output, *options) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (output / "model.safetensors").exists()
    rendering = json.loads((output / "rendering.json").read_text())
    assert rendering["thinking"] == "interleaved, as the template does"
    assert (output / "loss.png").stat().st_size > 1000
    assert "flexmask" not in (output / "config.json").read_text()
    assert model.generation_config.eos_token_id == 1787  # the stop token of the data already
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    assert sum("eval_loss" in entry for entry in log_of(output)) == 1
    assert [entry["step"] for entry in log_of(output) if "loss" in entry] == [1, 2]
    assert not any("train_samples_per_second" in entry for entry in log_of(output))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    model_dir, data, tmp_path, capsys, monkeypatch
):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    warned = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", warned.append)
    steps = ("--max_steps", 4, "--save_steps", 2, "--lr_scheduler_type", "constant")
    assert train(model_dir, data, whole, *steps) == 0
    assert train(model_dir, data, halves, *steps[2:], "--max_steps", 2) == 0
    assert train(model_dir, data, halves, *steps, "--resume", "--max_tokens", 9000) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-2: the run would go on with other batches than it began with" in error
    assert ": max_tokens was None, is 9000; resume it as it was begun" in error
    assert train(model_dir, data, halves, *steps, "--resume") == 0
    assert not [text for text in warned if "missing keys" in text]  # the head is tied
    weights = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (whole, halves)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("length", ["max_steps", "num_train_epochs"])
def test_a_run_with_nothing_left_to_train_says_so_and_saves_the_model(
    model_dir, data, tmp_path, capsys, length
):
    output = tmp_path / "run"
    steps = ("--max_steps", -1, "--num_train_epochs", 1, "--per_device_train_batch_size", 4)
    assert train(model_dir, data, output, "--save_steps", 1, *steps) == 0
    assert log_of(output)[-1]["train_loss"] > 0
    (output / "model.safetensors").unlink()
    capsys.readouterr()
    if length == "max_steps":
        steps += ("--max_steps", 1)
    assert train(model_dir, data, output, "--resume", *steps) == 0
    said = capsys.readouterr().err
    ends = "1 ends at step 1" if length == "max_steps" else "1.0 ends at step 2"
    assert (
        f"{output / 'checkpoint-2'}: is at step 2, and --{length} {ends}: nothing is left to "
        f"train; raise --{length} to go on\n"
    ) in said
    assert said.endswith("run: the model, saved after step 2\n")
    assert (output / "model.safetensors").exists()
    assert [entry["step"] for entry in log_of(output)] == [1, 2]
    assert "train_loss" not in said


def test_the_trained_stop_token_is_saved_where_generation_looks_for_it(data, tmp_path, capsys):
    base = write_model(tmp_path / "base", eos_token_id=1785)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    prepared = tmp_path / "prepared"
    assert run("prepare", data, "--tokenizer", base, "--output", prepared) == 0
    for name, source, options in (("whole", data, ()), ("lora", prepared, ("--use_peft",))):
        assert train(base, source, tmp_path / name, "--max_steps", 1, *options) == 0
        line = "stop tokens: the data end turns with '<|im_end|>' (1787), where the model would not"
        said = capsys.readouterr().err
        assert line in said
        what = "adapters" if options else "model"
        assert said.endswith(f"{tmp_path / name}: the {what}, saved after step 1\n")
        saved = GenerationConfig.from_pretrained(tmp_path / name)
        assert saved.eos_token_id == [1785, 1787]


def test_a_run_that_is_stopped_says_where_and_how_to_go_on(
    model_dir, data, tmp_path, capsys, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    output = tmp_path / "run"
    monkeypatch.setattr(LogEnds, "on_epoch_end", interrupt)
    options = ("--per_device_train_batch_size", 4, "--save_steps", 1, "--max_steps", 9)
    assert train(model_dir, data, output, *options) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("flexmask: stopped after step 2 of 9; the same command with --resume ")
    assert said.endswith(f"goes on from {output / 'checkpoint-2'}")


def test_no_picture_is_drawn_where_no_loss_was_logged(tmp_path, capsys):
    draw_training([{"step": 2, "train_loss": 1.0}], tmp_path / "loss.png")
    assert "loss.png: not drawn, no loss was logged" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()


def test_adapters_are_trained_around_weights_of_4_bits(data, tmp_path):
    pytest.importorskip("bitsandbytes")
    base, output = write_model(tmp_path / "base", with_weights=True), tmp_path / "out"
    names = (data, "--model", base, "--output", output, "--use_cpu", "--max_steps", 1)
    options = ("--use_peft", "--load_in_4bit", "--gradient_checkpointing", "--merge_lora")
    assert run("train", *names, *options) == 0
    assert (output / "adapter_model.safetensors").exists()
    assert (output / "merged" / "model.safetensors").exists()


def test_lora_trains_adapters_only(model_dir, data, tmp_path, capsys):
    output = tmp_path / "lora"
    options = ("--use_peft", "--lora_r", 2, "--dtype", "bfloat16")
    assert train(model_dir, data, output, *options) == 0
    assert "rounding" not in capsys.readouterr().err  # adapters are trained in float32
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()


def test_a_merged_model_has_the_loss_of_the_model_with_adapters(model_dir, data, tmp_path, capsys):
    output = tmp_path / "lora"
    options = ("--use_peft", "--merge_lora", "--eval_data", data, "--eval_on_start")
    assert train(model_dir, data, output, *options, "--learning_rate", 0.1) == 0
    assert f"{output / 'merged'}: the model with its adapters merged" in capsys.readouterr().err
    model = patch(AutoModelForCausalLM.from_pretrained(output / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(output / "merged")
    conversations = [json.loads(line) for line in data.read_text().splitlines()]
    loss = model(**TreeCollator(tokenizer)(conversations)).loss.item()
    before, *_, after = (e["eval_loss"] for e in log_of(output) if "eval_loss" in e)
    assert loss == pytest.approx(after, rel=1e-5)
    assert abs(before - after) > 0.01
    assert not list(output.glob("*.partial"))


def test_a_model_for_images_trains_what_text_reaches(model_dir, data, tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_dir, folder)
    settings = json.loads((model_dir / "config.json").read_text())
    axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    text = settings | {"model_type": "qwen2_5_vl_text", "hidden_size": 64, "rope_parameters": axes}
    tower = {"depth": 1, "num_heads": 2, "hidden_size": 16, "out_hidden_size": 64}
    config = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": tower}
    (folder / "config.json").write_text(json.dumps(config))
    assert train(folder, data, output, "--use_peft") == 0
    assert "parameters that text does not reach" in capsys.readouterr().err
    trained = load_file(output / "adapter_model.safetensors")
    changed = {name for name, weight in trained.items() if "lora_B" in name and weight.any()}
    assert changed
    assert not any("visual" in name for name in changed)


@pytest.mark.parametrize("weighting", ["turn", "conversation"])
def test_weightings_give_a_mean_loss_per_unit(model_dir, data, tmp_path, capsys, weighting):
    output = tmp_path / "run"
    assert train(model_dir, data, output, "--weighting", weighting, "--dtype", "bfloat16") == 0
    assert "loses updates below about 1/256 of a weight" in capsys.readouterr().err
    first = next(entry["loss"] for entry in log_of(output) if "loss" in entry)
    assert first == pytest.approx(torch.log(torch.tensor(2048.0)).item(), rel=0.1)


def test_two_processes_train_together(model_dir, data, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "flexmask", "train", data, "--model", model_dir, "--output", two]
    command += ["--from_config", "--use_cpu", "--max_steps", "2", "--logging_steps", "1"]
    command += ["--per_device_train_batch_size", "2"]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert train(model_dir, data, one, "--per_device_train_batch_size", 4) == 0
    losses = [[e["loss"] for e in log_of(p) if "loss" in e] for p in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def by_budget(model_dir, data, output, *others):
    """Arguments of a run whose batches are rows of at most 1,500 tokens."""
    return (
        *("train", data, "--model", model_dir, "--output", output, "--from_config"),
        *("--use_cpu", "--max_tokens", 1500, "--num_train_epochs", 2, "--logging_steps", 1),
        *("--lr_scheduler_type", "constant", "--disable_tqdm", "true", *others),
    )


def test_a_run_by_budget_resumes_within_an_epoch_where_it_stopped(model_dir, data, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    options = ("--save_steps", 9, "--dataloader_num_workers", 2)
    assert run(*by_budget(model_dir, data, whole, *options)) == 0
    steps = [entry["step"] for entry in log_of(whole) if "loss" in entry]
    assert steps == list(range(1, 15))  # 7 rows an epoch
    shutil.copytree(whole / "checkpoint-9", half / "checkpoint-9")
    assert run(*by_budget(model_dir, data, half, *options, "--resume")) == 0
    weights = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (whole, half)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)


def test_two_processes_by_budget_train_every_tree_once(model_dir, data, tmp_path, capsys):
    """One update an epoch: however trees are dealt out, its loss is that of all of them."""
    two, one = tmp_path / "two", tmp_path / "one"
    options = ("--gradient_accumulation_steps", 100)
    said = launch(*TORCHRUN, "-m", "flexmask", *by_budget(model_dir, data, two, *options))
    assert "8 rows of at most 1,500 tokens" in said
    assert run(*by_budget(model_dir, data, one, *options, "--rows_per_batch", 3)) == 0
    report = capsys.readouterr().err
    assert "1 larger, cut into 4 pieces, with 2,171 tokens of history computed again" in report
    assert "7 rows of at most 1,500 tokens" in report
    losses = [[e["loss"] for e in log_of(p) if "loss" in e] for p in (two, one)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows_per_batch", 2), "--rows_per_batch fills rows of --max_tokens tokens"),
        (
            ("--rows_per_batch", 2, "--max_tokens", 9, "--per_device_train_batch_size=2"),
            "leave out one",
        ),
        (("--max_tokens", 9, "--dataloader_drop_last"), "--dataloader_drop_last must be False"),
        (("--max_tokens", 9000, "--rows_per_batch", 0), "rows_per_batch must be at least 1, got 0"),
        (("--output_dir", "other"), "--output_dir is --output here"),
        (("--resume-from-checkpoint=other",), "--resume_from_checkpoint is --resume here"),
        (("--eval_split", 1), "--eval_split must be in [0, 1), got 1.0"),
        (("--eval_split", 0.5, "--eval_data", "other"), "leave out one"),
        (("--learning_rate", "nan"), "--learning_rate must be at least 0, got nan"),
        (("--neftune_noise_alpha", 5), "--neftune_noise_alpha must be 0, got 5.0"),
        (("--train_sampling_strategy", "group_by_length"), "group_by_length cannot see"),
        (("--backend", "triton"), "backend 'triton' needs CUDA tensors, got cpu"),
        (("--backend", "flex"), "--backend flex has no backward pass on the CPU"),
        (("--eval_strategy", "steps"), "--eval_strategy steps has nothing to evaluate on"),
        (("--load_best_model_at_end", "--eval_split", 0.5), "strategy: SaveStrategy.STEPS"),
        (("--use_liger_kernel",), "--use_liger_kernel needs a GPU, got cpu"),
        (("--report_to", "nowhere"), "--report_to: nowhere is not supported"),
        (("--optim", "galore_adamw"), "--optim galore_adamw: You need to install"),
        (("--use_peft", "--lora_dropout", 0.1), "--lora_dropout must be 0, got 0.1"),
        (("--use_peft", "--lora_target_modules", "x"), "--lora options: Target modules {'x'} not"),
        (("--lora_r", 8), "--lora_r is for runs with adapters; give --use_peft too"),
        (("--sequence_parallel_size", 2), "must divide the number of processes, 1, got 2; start a"),
        (("--cp_size", 2), "unknown option --cp_size (did you mean --sequence_parallel_size?)"),
        (("--merge_lora",), "--merge_lora is for runs with adapters; give --use_peft too"),
        (("--load_in_4bit",), "--load_in_4bit is for runs with adapters; give --use_peft too"),
        (
            ("--use_peft", "--load_in_4bit", "--from_config"),
            "--load_in_4bit quantizes a checkpoint's weights; leave out --from_config",
        ),
        (("--num_epochs", 3), "unknown option --num_epochs (did you mean --num_train_epochs?)"),
        (("--lr", 1e-5), "unknown option --lr (did you mean --learning_rate?)"),
        (("--packing",), "unknown option --packing (did you mean --max_tokens?)"),
        (("--bf16", "true", "other.jsonl"), "other.jsonl: stands apart from the other DATA"),
        (
            ("--kernel_options", "{}"),
            "kernel_options are FlexAttention's: they need backend='flex'",
        ),
        (("--chat_template_kwargs", "[]"), "--chat_template_kwargs must be a JSON object"),
        (("--use_peft", "--lora_r", 0), "--lora_r must be at least 1, got 0"),
        (("--chat_template", sys.executable), "cannot be read: 'utf-8' codec"),
        (("--chat_template", "none.jinja"), "none.jinja: no such file"),
        (("--max_tokens", 40), "message 2: must have at most max_tokens = 40 tokens"),
        (("--tokenizer", "no/such/place"), "no/such/place: no such folder; name a tokenizer's"),
        (("--label_smoothing_factor", 0.1), "--label_smoothing_factor must be 0"),
        (("--eval_split", 2), r"--eval_split must be in [0, 1), got 2.0"),
    ],
)
def test_options_that_cannot_be_used_are_one_line_and_write_nothing(
    model_dir, data, tmp_path, capsys, options, message
):
    output = tmp_path / "out"
    names = (data, "--model", model_dir, "--output", output, "--from_config", "--use_cpu")
    assert run("train", *names, *options) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_without_a_gpu_the_cpu_is_chosen_and_bf16_is_refused(
    model_dir, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    names = (data, "--model", model_dir, "--output", tmp_path / "out", "--from_config")
    assert run("train", *names, "--bf16") == 2
    assert "give --dtype float32 without --bf16, or --use_cpu" in capsys.readouterr().err
    assert run("train", *names, "--label_smoothing_factor", 0.1) == 2  # `use_cpu` is set by then
    assert "--label_smoothing_factor must be 0" in capsys.readouterr().err


def test_processes_that_the_trainer_does_not_see_are_refused(model_dir, data, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = (data, "--model", model_dir, "--output", "out", "--from_config", "--use_cpu", "false")
    assert run("train", *names) == 2
    assert "WORLD_SIZE is 2, but the Trainer sees 1 process on " in capsys.readouterr().err


def test_a_file_that_has_gone_is_not_a_full_disk(tmp_path):
    gone, weights = tmp_path / "gone", {"a": torch.ones(3)}
    for write in (save_file, torch.save, lambda _, path: path.write_text("a")):
        with pytest.raises(DataError, match="No such file") as raised, checkpoint_errors(gone):
            write(weights, gone / "file")
        assert "a second run, has removed it" in str(raised.value)
        assert "space" not in str(raised.value)


def test_processes_must_weigh_the_tokens_of_the_whole_step(model_dir, data, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    names = (data, "--model", model_dir, "--output", "out", "--from_config", "--use_cpu")
    assert run("train", *names, "--average_tokens_across_devices", "false") == 2
    assert "--average_tokens_across_devices must be true with" in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["create_repo", "upload_folder"])
def test_a_hub_out_of_reach_is_one_line_and_the_trained_model_stays(
    model_dir, data, tmp_path, capsys, monkeypatch, fails
):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/run"))
    monkeypatch.setattr(HfApi, fails, unreachable)
    output = tmp_path / "run"
    assert train(model_dir, data, output, "--push_to_hub", "--save_strategy", "no") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flexmask: error: --push_to_hub: no route to host; ")
    if fails == "upload_folder":
        assert error.endswith(f"the model is saved: `hf upload me/run {output}` uploads it")
        assert AutoModelForCausalLM.from_pretrained(output)
        assert log_of(output)


def test_an_option_of_the_trainer_with_a_wrong_value_takes_two_lines(model_dir, data, capsys):
    names = (data, "--model", model_dir, "--output", "out", "--from_config")
    assert run("train", *names, "--learning_rate", "low") == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: flexmask train DATA... --model PATH_OR_ID")
    assert error.endswith("invalid float value: 'low'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokenizer", "A"), "A: the tokenizer has no chat template"),
        (("--chat_template", "wrong.jinja"), "wrong.jinja: the chat template is no Jinja template: "
         "line 2: "),
        (("--tokenizer", "B"), "B: holds no tokenizer ("),
        ((), "holds a config but no weights (*.safetensors or *.bin); --from_config draws them"),
    ],
)  # fmt: skip
def test_a_template_or_model_that_cannot_be_used_is_found_before_the_data_are_read(
    model_dir, data, tmp_path, capsys, monkeypatch, options, message
):
    shutil.copytree(model_dir, tmp_path / "A", ignore=shutil.ignore_patterns("*.jinja"))
    (tmp_path / "B").mkdir()
    shutil.copy(tmp_path / "A" / "config.json", tmp_path / "B")
    (tmp_path / "wrong.jinja").write_text("{% for m in messages %}\n{% if %}")
    monkeypatch.chdir(tmp_path)
    names = (data, "--model", model_dir, "--output", "out", "--use_cpu")
    assert run("train", *names, *(("--from_config", *options) if options else ())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "reading" not in error


def test_several_files_are_one_set_of_data_with_the_settings_of_the_template(
    model_dir, data, tmp_path, capsys
):
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "b.jsonl").write_text("".join(lines[3:5]))
    template = (TOKENIZER_PATH / "chat_template.jinja").read_text()
    (tmp_path / "template.jinja").write_text("{{ tone }}" + template)
    options = ("--chat_template", tmp_path / "template.jinja", "--on_overflow", "error")
    options += ("--chat_template_kwargs", '{"tone": "calm"}', "--max_tokens", 9)
    assert train(model_dir, tmp_path / "*.jsonl", tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert "*.jsonl: 5 conversations, " in said
    assert "a.jsonl:1: must have at most max_tokens = 9 tokens" in said
    run("show", data, "--tokenizer", model_dir, *options[:2], *options[4:6])
    assert "calm<|im_start|>" in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_one_line(model_dir, data, tmp_path, capsys):
    write_model(tmp_path, vocab_size=1500, pad_token_id=0)
    names = (data, "--model", tmp_path, "--tokenizer", model_dir, "--from_config")
    assert run("train", *names, "--output", tmp_path / "out", "--use_cpu") == 2
    assert "must be below the model's vocab_size of 1500" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_one_line(model_dir, data, tmp_path, capsys):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"cut short")
    assert run("train", data, "--model", model, "--output", tmp_path / "out") == 2
    assert f"{model}: cannot be loaded as a model" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What became of runs that were killed, or met a full disk."""
    files = write_model(tmp_path_factory.mktemp("ends"), with_weights=True)
    write_conversations(files / "data.jsonl", 6, shortest=True)
    results = tmp_path_factory.mktemp("runs") / "results.json"
    script = Path(__file__).with_name("killed_runs.py")
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, script, results, files], check=True, timeout=400, env=os.environ | settings
    )
    return json.loads(results.read_text())


def test_a_run_killed_at_any_moment_ends_where_an_uninterrupted_one_does(ends):
    assert len(ends["killed"]) > 5
    for touch, code, is_same in ends["killed"]:
        assert code == -signal.SIGKILL
        assert is_same, f"killed at touch {touch} of the output folder"


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints(ends):
    for code, said, is_left_alone, code_after_resuming in ends["full"]:
        assert code == 2
        assert said.splitlines()[-1].startswith("flexmask: error: ")
        assert "cannot be written" in said.splitlines()[-1]
        assert "free some space, and resume; earlier checkpoints are whole" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert is_left_alone
        assert code_after_resuming == 0
    assert "File too large" in ends["full"][0][1]
    assert "the disk did not take a whole file" in ends["full"][1][1]


def test_resuming_needs_a_run_or_a_free_folder(model_dir, data, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert train(model_dir, data, tmp_path, "--resume") == 2
    assert "holds files but no checkpoint to resume" in capsys.readouterr().err


@pytest.fixture
def bad_files(tmp_path):
    for name, text in {
        "empty.jsonl": "",
        "not_json.jsonl": "{",
        "role.jsonl": '{"messages": [{"role": "bot", "content": "hi"}]}',
        "no_assistant.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}',
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("empty.jsonl", "the file is empty"),
        ("not_json.jsonl", "not_json.jsonl:1: "),
        ("role.jsonl", "has role 'bot'; roles are"),
        ("no_assistant.jsonl", "no assistant message"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(model_dir, bad_files, capsys, file, message):
    output = bad_files / "out"
    assert train(model_dir, bad_files / file, output) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flexmask: error: ")
    assert message in error
    assert not output.exists()


def test_a_model_that_cannot_be_patched_is_refused(data, tmp_path, capsys):
    write_model(tmp_path, attention_dropout=0.1)
    assert train(tmp_path, data, tmp_path / "out") == 2
    assert "attention_dropout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_overwritten(model_dir, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(model_dir, data, tmp_path) == 2
    assert "holds another run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def busy(tmp_path):
    """A folder, and another process that is writing it."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def hold():
        with only_run(tmp_path / "busy"):
            begun.set()
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    assert begun.wait(60)
    yield tmp_path / "busy", process
    process.kill()
    process.join()


def test_a_folder_takes_one_run_at_a_time_and_a_killed_one_leaves_it_free(
    model_dir, data, busy, capsys, monkeypatch
):
    folder, process = busy
    monkeypatch.setattr("flexmask.files._PATIENCE_S", 0.0)
    for options in ((), ("--resume",)):
        assert train(model_dir, data, folder, *options) == 2
        said = capsys.readouterr().err
        assert said.endswith("by another run; wait for its end, or use another --output\n")
    process.kill()
    process.join()
    assert [path.name for path in folder.iterdir()] == [LOCK]
    assert train(model_dir, data, folder, "--resume", "--max_steps", 1) == 0
    assert not (folder / LOCK).exists()


def test_the_first_of_the_processes_of_a_run_locks_its_folder(monkeypatch):
    for rank, is_main in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("PMI_RANK", "3")  # of what has started torchrun
        assert _is_main() == is_main


def test_the_lock_is_not_uploaded(model_dir, data, tmp_path, monkeypatch):
    uploaded = set()

    def upload(_, *, folder_path, ignore_patterns, **__):
        held = [path.name for path in Path(folder_path).iterdir()]
        assert LOCK in held
        uploaded.update(filter_repo_objects(held, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/run"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    options = ("--push_to_hub", "--save_strategy", "no", "--max_steps", 1)
    train(model_dir, data, tmp_path / "run", *options)
    assert "model.safetensors" in uploaded
    assert LOCK not in uploaded


def test_bad_lines_are_skipped_on_request_and_listed(model_dir, data, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    path.write_text("{\n" + data.read_text() + '{"messages": []}\n')
    assert train(model_dir, path, tmp_path / "out", "--on-bad-line", "skip") == 0  # dashes do too
    report = capsys.readouterr().err
    assert "2 bad lines skipped" in report
    assert ":1: " in report
    assert ":10: " in report
    assert " more" not in report


def test_of_what_is_left_out_the_first_ten_are_listed(model_dir, data, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    path.write_text(12 * "{\n" + data.read_text())
    options = ("--on_bad_line", "skip", "--max_tokens", 250, "--on_overflow", "drop")
    assert train(model_dir, path, tmp_path / "out", *options) == 0
    report = capsys.readouterr().err
    assert "12 bad lines skipped" in report
    assert report.count("  skipped ") == report.count("  dropped ") == 10
    assert f"{path}:10: " in report
    assert f"{path}:11: " not in report
    assert "\n  and 2 more\n" in report
    assert "26 samples dropped" in report
    assert "\n  and 16 more\n" in report


def test_help_names_the_trainer(capsys):
    assert run("train", "--help") == 0
    assert "TrainingArguments" in capsys.readouterr().out


def test_module_and_script_are_the_same():
    result = subprocess.run(
        [sys.executable, "-m", "flexmask", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("flexmask 0.")
    assert Path(sys.executable).with_name("flexmask").exists()
