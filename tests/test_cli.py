"""What all commands share."""

import os
import sys

import pytest
from command_cases import run

from flexmask.demo import TOKENIZER_PATH

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
