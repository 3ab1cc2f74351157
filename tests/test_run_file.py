"""One YAML file for a run: the same as the words of a command line, refused where it is not."""

import json
import re
from pathlib import Path

import pytest
import yaml
from command_cases import run, write_conversations, write_model
from safetensors.torch import load_file
from transformers import TrainingArguments

from flexmask.tools.run_file import option_actions, read_run_file, text_or_json, to_yaml
from flexmask.tools.train.command import full_parser

DOCS = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
(EXAMPLE,) = re.findall(r"^```yaml\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
SMALL = ("--model", "model", "--from_config", "--use_cpu", "--dtype", "float32", "--bf16", "false")
SMALL += ("--max_steps", 2, "--logging_steps", 1, "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, data, and the example of the docs."""
    path = tmp_path_factory.mktemp("run")
    write_model(path / "model")
    write_conversations(path / "conversations.jsonl", 4, shortest=True)
    (path / "run.yaml").write_text(EXAMPLE)
    return path


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_the_example_of_the_docs_trains_and_what_it_leaves_trains_the_same_again():
    assert run("train", "run.yaml", *SMALL) == 0
    assert run("train", "tuned/resolved.yaml", "--output", "again") == 0
    one, two = (load_file(f"{name}/model.safetensors") for name in ("tuned", "again"))
    assert all(one[name].equal(two[name]) for name in one)
    resolved = Path("tuned/resolved.yaml").read_text()
    second = yaml.safe_load(Path("again/resolved.yaml").read_text())
    assert second == yaml.safe_load(resolved) | {"output": "again"}
    assert "\nlearning_rate: 1.0e-05\n" in resolved  # what the file says
    assert "\nmax_steps: 2\n" in resolved  # what the command line says
    assert "\nlogging_first_step: true\n" in resolved  # what neither says
    assert run("train", "run.yaml", *SMALL, "--save_steps", 1) == 2  # the folder is taken
    assert run("train", "run.yaml", *SMALL, "--max_steps", 3, "--resume") == 0
    log = json.loads(Path("tuned/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]


def test_other_commands_take_what_they_have_from_the_same_file(capsys):
    assert run("plan", "run.yaml", "--model", "model") == 0
    assert "with rows of at most 16,384 tokens" in capsys.readouterr().out
    small = ("--model", "model", "--from_config", "--dtype", "float32")
    assert run("verify", "run.yaml", *small, "--conversations", 1) == 0
    for command in (("show",), ("prepare", "--output", "prepared")):
        assert run(command[0], "run.yaml", *command[1:], "--tokenizer", "model") == 0
    Path("tokenizer.yaml").write_text("data: conversations.jsonl\nmodel: model\n")
    assert run("show", "tokenizer.yaml") == 0  # the model's own


def words_of(text, parser=None):
    Path("options.yaml").write_text(text)
    return read_run_file("options.yaml").words(parser or full_parser())


def sample_value(action):
    if action.choices is not None:
        return list(action.choices)[-1]
    if action.nargs == 0 or getattr(action.type, "__name__", "") == "string_to_bool":
        return not action.default
    if action.type is text_or_json or type(action).__name__ == "JsonObject":
        return {"a": [1e-5, "1e-5", None, {"b": False}]}
    if action.dest == "debug":
        return ["underflow_overflow"]
    value = {int: 7, float: 1e-7}.get(action.type, "- no: #é")
    return [value, "null"] if action.nargs in ("+", "*") else value


def test_every_option_can_be_written_in_the_file_and_comes_back_as_it_was():
    parser = full_parser()
    actions = option_actions(parser)
    values = {name: sample_value(action) for name, action in actions.items()}
    values |= {"data": ["a b.jsonl", "c.jsonl:2"], "lora_target_modules": ["q", "v"]}
    values |= {"eval_data": ["1e-5", "no"], "label_names": ["~"], "include_for_metrics": ["x"]}
    left_out = ("resume", "hub_token", "local_rank", "parallelism_config")
    for name in left_out:
        del values[name]
    assert values.keys() >= {*TrainingArguments.__dataclass_fields__} - {*left_out}
    options = vars(parser.parse_args(words_of(to_yaml(values), parser)))
    for name, value in values.items():
        assert options[name] == value, name


def test_secrets_and_resuming_are_not_written():
    assert to_yaml({"hub_token": "hf_1", "resume": True, "seed": 1, "model": None}) == "seed: 1\n"


def test_the_command_line_wins(capsys):
    Path("lora.yaml").write_text(
        "data: none.jsonl\nmodel: none/of/it\noutput: model\nuse_peft: true\nlora_r: 2\n"
    )
    names = ("conversations.jsonl", "--model", "model", "--from_config", "--output", "out")
    assert run("train", "lora.yaml", *names, "--no-use-peft") == 2
    error = capsys.readouterr().err
    assert error == "flexmask: error: --lora_r is for runs with adapters; give --use_peft too\n"


BAD = {
    "max_tokens: many": ":1: max_tokens must be a whole number, got many",
    "seed: 1\nlearning_rate: [1, 2]": ":2: learning_rate must be a number, got [1, 2]",
    "use_peft: 5": ":1: use_peft must be true or false, got 5",
    "bf16: 'on'": ":1: bf16 must be true or false, got on",
    "model: yes": ":1: model must be text, got yes",
    "weighting: turns": ":1: weighting must be one of token, turn, conversation, got turns",
    "data: {a: b}": ':1: data must be text, or a list of it, got {"a": "b"}',
    "data: [--model]": ':1: data must be text, or a list of it, got ["--model"]',
    "data: [[a]]": ':1: data must be text, or a list of it, got [["a"]]',
    "learning_rat: 1": ":1: unknown key learning_rat (did you mean learning_rate?); keys are",
    "lr: 1": ":1: unknown key lr (did you mean learning_rate?); keys are",
    "output_dir: a": "--output_dir is --output here",
    "chat_template_kwargs: [1]": "--chat_template_kwargs must be a JSON object, got [1]",
    "max_tokens: 0": "--max_tokens must be at least 1, got 0",
    "seed: 1\nseed: 2": ":2: seed is there twice; leave out one",
    "- a": ": holds no options; write one a line",
    "a: [": ": is not YAML: while parsing",
    "a: !!python/object:os.system {}": ": is not YAML: could not determine a constructor",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_what_cannot_be_used_is_one_line(text, message, capsys):
    Path("bad.yaml").write_text(text)
    given = {"data": "conversations.jsonl", "model": "model"}
    names = [given["data"]] * ("data:" not in text) + ["--output", "out", "--from_config"]
    names += ["--model", given["model"]] * ("model:" not in text)
    assert run("train", "bad.yaml", *names) == 2
    where = "" if message.startswith("--") else "bad.yaml"
    assert capsys.readouterr().err.startswith(f"flexmask: error: {where}{message}")


def test_a_key_that_neither_the_command_nor_training_has_is_refused(capsys):
    Path("plan.yaml").write_text("seed: 3\ntokenizer: model\nplots: a.png\n")
    assert run("plan", "plan.yaml", "conversations.jsonl") == 2
    assert "plan.yaml:3: unknown key plots (did you mean plot?)" in capsys.readouterr().err


def test_a_file_of_options_comes_first(capsys):
    assert run("plan", "conversations.jsonl", "run.yaml", "--tokenizer", "model") == 2
    assert "run.yaml: is no data; a file of options comes before" in capsys.readouterr().err
