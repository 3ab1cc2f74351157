"""What all commands share."""

import os
import subprocess
import sys

import pytest
from command_cases import run, write_conversations, write_model

from flexmask.demo import TOKENIZER_PATH
from flexmask.files import only_run

NEEDS = {
    "demo": "flexmask demo needs matplotlib",
    "show --output row.png": "--output needs matplotlib",
    "plan data.parquet --tokenizer TOKENIZER": "data.parquet: needs pyarrow",
    "train DATA --model MODEL --output out": "flexmask train needs accelerate and matplotlib",
}


@pytest.mark.parametrize(
    ("command", "message"), NEEDS.items(), ids=[name.split()[0] for name in NEEDS]
)
def test_a_package_that_is_missing_is_named_before_anything_else(
    command, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flexmask.errors.find_spec", lambda name: None)
    (tmp_path / "data.parquet").touch()
    assert run(*command.replace("TOKENIZER", str(TOKENIZER_PATH)).split()) == 2
    packages = message.partition(" needs ")[2].replace(" and ", " ")
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == f"flexmask: error: {message}, not installed here; pip install {packages}"


@pytest.mark.parametrize(
    ("arguments", "code"), [("--help", 0), ("show", 0), ("show --index -1", 2)]
)
@pytest.mark.parametrize("buffering", [1, 8192])  # a failure at the first line, or at the end
def test_a_reader_may_leave(arguments, code, buffering, monkeypatch):
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(f"sys.{name}", os.fdopen(writer, "w", buffering, "utf-8"))
    assert run(*arguments.split()) == code
    sys.stdout.flush()  # as Python does at its end


EARLY = {  # the folder "model" has a config and a tokenizer, and no weights
    "train none.jsonl --model model --output out": "none.jsonl: no such file",
    "train data.jsonl --model model --output out": "model: holds a config but no weights",
    "train data.jsonl --model ./none --output out": "./none: no such folder; name a model's",
    "train data.jsonl --model ./modle --output out": "./modle: no such folder (did you mean ./mode",
    "show data.jsonl --tokenizer ./modle/x/y": "./modle/x/y: no such folder (did you mean ./mod",
    "verify data.jsonl --model modle": "modle: no such folder (did you mean model?), nothing in ",
    "train data.jsonl --model . --output out": ".: holds no config.json",
    "train data.jsonl --model lora --output out": "lora: holds adapters without their model; name",
    "train data.jsonl --model whole --output data.jsonl": "data.jsonl: is a file; name a folder",
    "train data.jsonl --model whole --output locked/out/run": "locked: cannot be written to",
    "train data.jsonl --model whole --output model --learning_rate 1": "model: holds another run",
    "train data.jsonl --model whole --output busy": "busy: is being written by another run",
    "train --bf16 true --eval_data none --model a/b --output out": "none: no such file",
    "train data.jsonl --model a/b --output out --max_tokens 0": "--max_tokens must be at least 1",
    "train data.jsonl --model a/b --output out --lora_r 2 --lr 1": "--lora_r is for runs with",
    "train data.jsonl --model a/b --output out --kernel_options 5": "--kernel_options must be",
    "plan data.jsonl --tokenizer b/no/hub/id": "b/no/hub/id: no such folder; name a tokenizer's",
    "plan none.jsonl --tokenizer a/b": "none.jsonl: no such file",
    "plan data.jsonl --tokenizer a/b --plot none/plan.png": "none/plan.png: no such folder",
    "show none.jsonl --tokenizer a/b": "none.jsonl: no such file",
    "show --chat_template data": "data: no such file; --chat_template names a Jinja file",
    "verify none.jsonl --model a/b": "none.jsonl: no such file",
    "verify data.jsonl --model a/b --date tomorrow": "date must be a day such as",
    "prepare none.jsonl --tokenizer a/b --output out": "none.jsonl: no such file",
    "prepare data.jsonl --tokenizer model --output data.jsonl": "data.jsonl: is a file",
}
RUN_EACH = """
import os, sys
from flexmask import files
from flexmask.tools.cli import main
files._PATIENCE_S = 0.0
os.access = lambda path, mode: str(path) != "locked"  # root may write there
for command in sys.argv[1:]:
    try:
        main(command.split())
    except SystemExit as stopped:
        print(stopped.code, *{"torch", "transformers"} & sys.modules.keys())
"""


@pytest.mark.processes
def test_what_needs_no_model_is_refused_before_torch_is_imported(tmp_path):
    write_conversations(tmp_path / "data.jsonl", 1)
    write_model(tmp_path / "model")
    (write_model(tmp_path / "whole") / "model.safetensors").touch()
    for name in ("locked", "lora"):
        (tmp_path / name).mkdir()
    (tmp_path / "lora" / "adapter_config.json").touch()
    with only_run(tmp_path / "busy"):
        result = subprocess.run(
            [sys.executable, "-c", RUN_EACH, *EARLY],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        )
    assert result.stdout.split("\n") == ["2"] * len(EARLY) + [""]
    for line, message in zip(result.stderr.splitlines(), EARLY.values(), strict=True):
        assert line.startswith(f"flexmask: error: {message}")
