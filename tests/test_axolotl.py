"""`axolotl train` with a `flexmask:` block equals N-pass, or is refused; `make test-axolotl`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("axolotl") is None:
    pytest.skip("axolotl is not installed; make test-axolotl", allow_module_level=True)
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

import torch
import yaml
from trainer_cases import LEARNING_RATE, assert_same_weights, parameters, train_npass
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flexmask import FlexmaskError, TreeCollator, read_conversations
from flexmask.demo import CONFIG_PATH, DATA_PATH, TOKENIZER_PATH
from flexmask.model.loss import weighted_causal_loss
from flexmask.model.npass import npass_batches
from flexmask.training.options import TrainConfig

SECTION = (Path(__file__).parent.parent / "docs/trainers.md").read_text().split("## axolotl\n")[1]
RECIPE = re.search(r"```yaml\n(.*?)```", SECTION, re.DOTALL)[1]
DATA = [1, 3, 5, 6]  # short ones of the shipped conversations: 1,492 tokens
# A step is linear in its gradient, and takes all of the data.
LINEAR = {
    "optimizer": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler": "constant",
    "max_grad_norm": 0.0,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the recipe names: a model, here a tiny one, and conversations."""
    folder = tmp_path_factory.mktemp("axolotl")
    model = folder / "Qwen/Qwen3-4B"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG_PATH)).save_pretrained(model)
    AutoTokenizer.from_pretrained(TOKENIZER_PATH).save_pretrained(model)
    lines = DATA_PATH.read_text().splitlines(keepends=True)
    (folder / "conversations.jsonl").write_text("".join(lines[index] for index in DATA))
    (folder / "others.jsonl").write_text(lines[15] + lines[29])
    return folder


@pytest.fixture
def write(folder, tmp_path, monkeypatch):
    """Writes the recipe with other settings to a file, and goes where its names are."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["axolotl"])

    def write_recipe(**settings):
        path = tmp_path / "run.yaml"
        held = {"output_dir": str(tmp_path / "tuned")} | settings
        path.write_text(RECIPE + yaml.safe_dump(held))  # of a key given twice the last one counts
        return str(path)

    return write_recipe


def samples_of(folder, name="conversations.jsonl"):
    collator = TreeCollator(AutoTokenizer.from_pretrained(folder / "Qwen/Qwen3-4B"))
    return [collator.samples(one) for one in read_conversations(folder / name)]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


def train(path):
    """Run a configuration in this process, which has loaded axolotl."""
    from axolotl.cli.train import do_cli

    do_cli(path)


def checked(path, **settings):
    """What the plugin makes of a configuration that axolotl has accepted."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    return PluginManager.get_instance().load_datasets(DictDefault({**load_cfg(path), **settings}))


def test_the_session_of_the_docs_equals_three_steps_of_npass(folder, write, tmp_path):
    model = load(folder / "Qwen/Qwen3-4B")
    before = parameters(model)
    command = re.search(r"```sh\n(axolotl .*?)\n```", SECTION)[1].split()
    command[-1] = write(**LINEAR)
    bin_folder = Path(sys.executable).parent
    result = subprocess.run(
        [bin_folder / command[0], *command[1:]],
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert not result.returncode, result.stderr[-3000:]
    assert "4 conversations, 11 samples" in result.stderr
    theirs = train_npass(model, conversations=samples_of(folder))
    assert_same_weights(parameters(load(tmp_path / "tuned")), before, theirs)


def test_rows_accumulation_and_weights_equal_npass(folder, write, tmp_path):
    model = load(folder / "Qwen/Qwen3-4B")
    before = parameters(model)
    train(write(flexmask={"max_tokens": 800, "weighting": "turn"}, **LINEAR))
    theirs = train_npass(model, "turn", samples_of(folder))
    assert_same_weights(parameters(load(tmp_path / "tuned")), before, theirs)


def test_batches_of_conversations_and_their_evaluation_equal_npass(folder, write, tmp_path):
    model = load(folder / "Qwen/Qwen3-4B")
    before = parameters(model)
    others = [s for group in samples_of(folder, "others.jsonl") for s in group]
    weight = sum(float(sample.loss_weights[1:].sum()) for sample in others)
    with torch.no_grad():
        expected = sum(
            weighted_causal_loss(
                model(batch["input_ids"]).logits, batch["shift_labels"], None, weight
            )
            for batch in npass_batches(others)
        )
    settings = LINEAR | {"micro_batch_size": 3, "save_strategy": "epoch", "eval_strategy": "epoch"}
    train(write(flexmask=None, test_datasets=[{"path": "others.jsonl"}], **settings))
    theirs = train_npass(model, conversations=samples_of(folder))
    assert_same_weights(parameters(load(tmp_path / "tuned")), before, theirs)
    state = json.loads((tmp_path / "tuned/checkpoint-3/trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluated[0] == pytest.approx(expected.item(), rel=1e-5)  # before the first step
    assert len(evaluated) == 4


def test_adapters_equal_npass(folder, write, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    get_peft_model(load(folder / "Qwen/Qwen3-4B"), config).save_pretrained(tmp_path / "adapter")
    settings = {"lora_model_dir": str(tmp_path / "adapter"), "gradient_checkpointing": True}
    settings |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    train(write(adapter="lora", lora_r=4, lora_alpha=8, **settings, **LINEAR))

    def adapted(path, **options):
        return PeftModel.from_pretrained(load(folder / "Qwen/Qwen3-4B"), path, **options)

    model = adapted(tmp_path / "adapter", is_trainable=True)
    before = parameters(model)
    theirs = train_npass(model, conversations=samples_of(folder))
    assert_same_weights(parameters(adapted(tmp_path / "tuned")), before, theirs)


def test_every_key_of_the_block_is_described_as_the_option_of_train():
    from flexmask.integrations.axolotl.options import FlexmaskBlock

    helps = {option.name: option.metadata["help"] for option in fields(TrainConfig)}
    for name, field in FlexmaskBlock.model_fields.items():
        assert field.description == helps[name]
        assert f"`{name}`" in SECTION or name in RECIPE


def test_the_plugin_is_found_once_flexmask_is_installed():
    found = {entry.name: entry.value for entry in entry_points(group="axolotl.plugins")}
    assert found["flexmask"] == "flexmask.integrations.axolotl.plugin:FlexmaskPlugin"


def test_without_the_block_the_plugin_does_nothing():
    from axolotl.utils.dict import DictDefault

    from flexmask.integrations.axolotl.plugin import FlexmaskPlugin

    plugin, cfg = FlexmaskPlugin(), DictDefault({"sample_packing": True})
    assert plugin.load_datasets(cfg) is None
    assert plugin.post_model_load(cfg, model=None) is None
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_training_args(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert plugin.add_callbacks_pre_trainer(cfg, model=None) == []
    assert plugin.post_trainer_create(cfg, trainer=None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_packing": True}, "sample_packing: .*max_tokens .* fills rows"),
        ({"group_by_length": True}, "group_by_length: .*max_tokens"),
        ({"rl": "dpo"}, "rl: must be left out with flexmask, got 'dpo'; flexmask trains on whole"),
        ({"curriculum_sampling": True}, "curriculum_sampling: .* rows are filled in random order"),
        ({"min_sample_len": 5}, "min_sample_len: must be left out .* reads and renders the data"),
        ({"streaming": True}, "streaming: .*read first"),
        ({"context_parallel_size": 2}, "context_parallel_size: .*whole ones"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: .*whole ones"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: .*other noise"),
        ({"lora_dropout": 0.05}, "lora_dropout: .*N-pass would drop others"),
        ({"adapter": "mixlora"}, "adapter: must be one of lora, qlora with flexmask"),
        ({"attn_implementation": "xformers"}, "attn_implementation: .*eager, .*got 'xformers'"),
        ({"flexmask": {"backend": "flex"}}, "backend flex has no backward pass on the CPU"),
        ({"use_dft": True}, "use_dft: .*would not be N-pass's"),
        ({"train_on_inputs": True}, "train_on_inputs: .*at inference"),
        ({"val_set_size": 500}, "val_set_size: must be a share below 1"),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, r"datasets\[0\].type: .*alpaca"),
        (
            {"datasets": [{"path": "a.jsonl", "roles_to_train": ["user"]}]},
            r"datasets\[0\].roles_to_train: must be left out .*docs/formats.md",
        ),
        (
            {"datasets": [{"path": "a.jsonl", "field_messages": "chat"}]},
            r"datasets\[0\].field_messages: .*data_columns of the flexmask block",
        ),
        (
            {"datasets": [{"path": "a.jsonl", "message_property_mappings": {"role": "who"}}]},
            r"datasets\[0\].message_property_mappings: must be left out",
        ),
        ({"datasets": [{"path": "nowhere.jsonl"}]}, "nowhere.jsonl: no such file"),
        (
            {"datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl", "split": "test"}]},
            "datasets: split must be the same in all entries with flexmask, got None, test",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_would_not_equal_npass_is_refused_by_name(write, settings, message):
    with pytest.raises(FlexmaskError, match=message):
        checked(write(), **settings)


def test_entries_may_name_the_split_of_a_file_and_a_weight(write):
    first = {"path": "conversations.jsonl", "split": "train"}
    second = {"path": "others.jsonl", "split": "train", "weight": 0.5}
    found = checked(write(datasets=[first, second], test_datasets=[{"path": "others.jsonl"}]))
    assert len(found.train_dataset) == len(DATA) + 2 * 0.5
    assert len(found.eval_dataset) == 2


def test_the_chat_template_of_the_run_is_that_of_its_data(folder, write):
    says = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    (folder / "plain.jsonl").write_text(json.dumps({"messages": says}))
    template = (TOKENIZER_PATH / "chat_template.jinja").read_text()
    own = template.replace("<|im_start|>", "<|im_start|>my ")
    chosen = {}, {"chat_template": "chatml"}, {"chat_template_jinja": own}
    entry = {"path": "plain.jsonl", "type": "chat_template"}
    found = [checked(write(datasets=[entry], **one)).train_dataset[0] for one in chosen]
    num_tokens = [tree.num_tokens for tree in found]
    assert num_tokens[0] == num_tokens[1] < num_tokens[2]


def test_a_refusal_ends_axolotl_before_the_model_is_loaded(write, tmp_path):
    with pytest.raises(FlexmaskError, match="sample_packing"):
        train(write(sample_packing=True, **LINEAR))
    assert not (tmp_path / "tuned/config.json").exists()


def test_a_refusal_is_one_line_on_the_terminal(write):
    command = [sys.executable, "-m", "axolotl.cli.train", write(sample_packing=True)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "flexmask: error: sample_packing: must be left out" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_the_block_does_not_have_is_an_error(write):
    with pytest.raises(ValueError, match=r"flexmask.max_token\n.*Extra inputs"):
        checked(write(flexmask={"max_token": 800}))


def test_commands_that_read_data_in_another_way_are_refused(write):
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    from flexmask.integrations.axolotl.plugin import FlexmaskPlugin

    cfg = load_cfg(write())
    with pytest.raises(FlexmaskError, match="axolotl preprocess"):
        PluginManager.get_instance().load_datasets(cfg, preprocess=True)
    with pytest.raises(FlexmaskError, match="axolotl evaluate"):
        FlexmaskPlugin().get_trainer_cls(cfg)
