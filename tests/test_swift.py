"""ms-swift with flexmask's plugin: three steps of its command equal three of N-pass by hand."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_cases import write_conversations, write_model
from safetensors.torch import load_file
from trainer_cases import LEARNING_RATE, NUM_STEPS, assert_same_weights, parameters, train_npass

from flexmask import FlexmaskError, read_conversations, render_samples

if find_spec("swift") is None:
    pytest.skip("needs ms-swift; `make test-swift` installs it", allow_module_level=True)

from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENT = Path(__file__).parent.parent / "docs" / "trainers.md"
PLUGIN = subprocess.check_output(
    [sys.executable, "-m", "flexmask.integrations.swift"], text=True
).strip()
# One step takes all of the data, with SGD at a constant rate: linear in its gradient.
EXACT = {
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "weight_decay": 0,
    "max_steps": NUM_STEPS,
    "torch_dtype": "float32",
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "add_version": "false",
    "check_model": "false",
    "dataloader_num_workers": 0,
    # A folder's name does not tell ms-swift which template the model has, as that of a hub does.
    "model_type": "qwen3",
    "template": "qwen3",
}
BY_CONVERSATION = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with random weights, and four conversations."""
    folder = write_model(tmp_path_factory.mktemp("swift") / "model", with_weights=True)
    write_conversations(folder / "data.jsonl", 4, shortest=True)
    return folder


@pytest.fixture(scope="module")
def samples(model):
    """The samples of each conversation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [render_samples(one, tokenizer) for one in read_conversations(model / "data.jsonl")]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def words(options):
    pairs = ((f"--{name}", value) for name, value in options.items())
    return [str(word) for name, value in pairs for word in (name, *[value])]


def sft(model, output, settings=None, **options):
    """Run `swift sft` in this process; returns the last checkpoint."""
    from swift.pipelines import sft_main

    sft_main(words(arguments(model, output, settings, **options)))
    return output / "last-checkpoint"


def arguments(model, output, settings=None, **options):
    given = {
        "model": model,
        "dataset": model / "data.jsonl",
        "output_dir": output,
        "external_plugins": PLUGIN,
        "tuner_type": "full",
        "disable_ignore_empty_think": "true",
        "model_kwargs": json.dumps({"flexmask": settings or {}}),
    }
    return given | EXACT | options


def assert_equals_npass(checkpoint, model, samples, weighting="token"):
    """The weights of a checkpoint are those of N-pass."""
    oracle = load(model)
    before = parameters(oracle)
    theirs = train_npass(oracle, weighting, samples)
    assert_same_weights(parameters(load(checkpoint)), before, theirs)


def session():
    """The commands of a stranger's session in the docs."""
    section = DOCUMENT.read_text().partition("\n## ms-swift\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_the_session_of_the_docs_equals_npass(model, samples, tmp_path):
    install, command = session()
    assert "'.[swift]'" in install
    for name, value in {
        "PATH_OR_ID": model,
        "FILE.jsonl": model / "data.jsonl",
        "DIR": tmp_path,
        "python ": f"{sys.executable} ",
        "swift sft": f"{Path(sys.executable).parent / 'swift'} sft",
    }.items():
        assert name in command
        command = command.replace(name, str(value))
    subprocess.run(["bash", "-c", f"{command.strip()} {' '.join(words(EXACT))}"], check=True)
    assert_equals_npass(tmp_path / "last-checkpoint", model, samples)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({"max_tokens": 300}, {"gradient_accumulation_steps": 4}, id="rows"),
        pytest.param({}, BY_CONVERSATION, id="conversations"),
        pytest.param({"weighting": "turn"}, BY_CONVERSATION, id="weighted"),
        pytest.param({}, BY_CONVERSATION | {"dataloader_num_workers": 1}, id="worker"),
    ],
)
def test_three_steps_equal_npass(model, samples, tmp_path, settings, options):
    checkpoint = sft(model, tmp_path, settings, **options)
    assert_equals_npass(checkpoint, model, samples, settings.get("weighting", "token"))


def test_two_processes_train_each_of_three_conversations_once(model, samples, tmp_path):
    lines = (model / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "three.jsonl").write_text("".join(lines[:3]))
    two = {"dataset": tmp_path / "three.jsonl", "per_device_train_batch_size": 2, "use_cpu": "true"}
    given = words(arguments(model, tmp_path, **two))
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, "-m", *ranks, "-m", "swift.cli.sft", *given], check=True)
    assert_equals_npass(tmp_path / "last-checkpoint", model, samples[:3])


def test_adapters_equal_npass(model, samples, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    start = tmp_path / "start"
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(load(model), config).save_pretrained(start)
    oracle = PeftModel.from_pretrained(load(model), start, is_trainable=True)
    before = parameters(oracle)
    theirs = train_npass(oracle, conversations=samples)
    lora = {"tuner_type": "lora", "lora_dropout": 0, "adapters": start}
    checkpoint = sft(model, tmp_path / "out", **lora, **BY_CONVERSATION)
    ours = parameters(PeftModel.from_pretrained(load(model), checkpoint))
    assert_same_weights(ours, before, theirs)


def test_evaluation_takes_the_mean_over_loss_weights(model, tmp_path):
    held_out = {"val_dataset": model / "data.jsonl", "eval_strategy": "steps", "eval_steps": 1}
    sft(model, tmp_path, **BY_CONVERSATION, **held_out, learning_rate=0)
    log = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    losses, evaluated = ([e[key] for e in log if key in e] for key in ("loss", "eval_loss"))
    assert losses + evaluated == pytest.approx([losses[0]] * 2 * NUM_STEPS, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 300}], ids=["conversations", "rows"])
def test_a_resumed_run_ends_with_the_same_weights(model, tmp_path, settings):
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 1}
    whole = sft(model, tmp_path / "whole", settings, **one)
    begun = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-1"}
    resumed = sft(model, tmp_path / "resumed", settings, **one, **begun)
    weights = [load_file(path / "model.safetensors") for path in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


REFUSED = {
    "packing true --attn_impl flash_attn": "--packing must be false",
    "padding_free true --attn_impl flash_attn": "--padding_free must be false",
    "sequence_parallel_size 2": "--sequence_parallel_size must be 1, got 2; it cuts rows",
    "streaming true": "--streaming must be false",
    "truncation_strategy left": "--truncation_strategy must be delete",
    "max_length 64": "--max_length must be left out, got 64; the budget of a row is max_tokens",
    "loss_scale hermes": "--loss_scale must be default or last_round, got 'hermes'",
    "disable_ignore_empty_think false": "an empty thought that the template writes is trained",
    "template chatml": "--template must be that of the model, got 'chatml'",
    "use_chat_template false": "--use_chat_template must be true",
    "preserve_thinking true": "thinking_history",
    "enable_thinking false": "chat_template_kwargs",
    "agent_template hermes": "--agent_template must be left out",
    "strict true": "--strict must be false, got True; flexmask stops at a bad line",
    'columns {"a":"messages"}': "--columns must be left out.*data_columns",
    "neftune_noise_alpha 5": "--neftune_noise_alpha must be 0, got 5",
    "label_smoothing_factor 0.1": "--label_smoothing_factor must be 0",
    "tuner_type lora": "--lora_dropout must be 0, got 0.05; N-pass would drop others",
    "tuner_type longlora": "--tuner_type must be full or lora",
    "task_type seq_cls --num_labels 2": "--task_type must be causal_lm",
    "enable_dft_loss true": "--enable_dft_loss must be false",
    "use_logits_to_keep true": "--use_logits_to_keep must be false",
    "group_by_length true": "--group_by_length must be false",
    "train_dataloader_shuffle false": "--train_dataloader_shuffle must be true",
    "router_aux_loss_coef 0.1": "--router_aux_loss_coef needs --gradient_checkpointing false",
    "split_dataset_ratio 1.5": r"--split_dataset_ratio must be in \[0, 1\), got 1.5",
    "optimizer muonclip": "muonclip watches an attention",
}


@pytest.mark.parametrize(("option", "message"), REFUSED.items(), ids=REFUSED)
def test_an_option_that_would_not_be_exact_is_refused(model, tmp_path, option, message):
    from swift.arguments import SftArguments
    from swift.utils import parse_args

    given = words(arguments(model, tmp_path))
    with pytest.raises(FlexmaskError, match=message):
        parse_args(SftArguments, [*given, *f"--{option}".split()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_token": 100}, r"no setting 'max_token' \(did you mean max_tokens\?\)"),
        ({"max_tokens": "100"}, "max_tokens must be a number, got '100'"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"weighting": "row"}, "weighting must be one of"),
        ({"kernel_options": 1}, "kernel_options must be an object, got 1"),
        (7, "flexmask must be an object of settings, got 7"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(model, tmp_path, settings, message):
    with pytest.raises(FlexmaskError, match=message):
        sft(model, tmp_path, settings)


def test_a_setting_outside_flexmasks_own_object_is_refused(model, tmp_path):
    with pytest.raises(FlexmaskError, match=r'as in .{"flexmask": {"max_tokens": 512}}'):
        sft(model, tmp_path, model_kwargs='{"max_tokens": 512}')


def test_a_refusal_is_one_line_on_the_terminal(model, tmp_path):
    given = words(arguments(model, tmp_path, padding_free="true", attn_impl="flash_attn"))
    command = [sys.executable, "-m", "swift.cli.sft", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "\nflexmask: error: --padding_free must be false" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file"),
        (
            "data.jsonl#500",
            "data.jsonl#500: flexmask takes no number .* data.jsonl:0.5 trains half",
        ),
        ("org/name", "org/name: flexmask reads it from the Hugging Face Hub, ms-swift from Model"),
    ],
)
def test_data_that_ms_swift_would_read_otherwise_are_refused(model, tmp_path, name, message):
    with pytest.raises(FlexmaskError, match=message):
        sft(model, tmp_path, dataset=name)


def test_other_trainings_are_refused(model, tmp_path):
    from swift.pipelines import pretrain_main, rlhf_main

    given = words(arguments(model, tmp_path))
    with pytest.raises(FlexmaskError, match="--rlhf_type must be left out, got 'dpo'"):
        rlhf_main([*given, "--rlhf_type", "dpo"])
    with pytest.raises(
        FlexmaskError, match="--loss_scale must be default or last_round, got 'all'"
    ):
        pretrain_main(given)
