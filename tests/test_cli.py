"""What all commands share."""

import os
import sys

import pytest
from command_cases import run


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
