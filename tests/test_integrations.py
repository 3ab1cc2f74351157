"""What the plugins share, without the frameworks."""

import subprocess
import sys

import pytest

RAISE = """
from flexmask.errors import DataError
from flexmask.integrations.ending import end_in_one_line

end_in_one_line()
raise {error}
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("DataError('a.jsonl: no such file')", "flexmask: error: a.jsonl: no such file\n"),
        ("KeyError('a')", "Traceback (most recent call last):\n"),
    ],
)
def test_a_refusal_ends_in_one_line_and_a_mistake_in_a_traceback(error, said):
    code = RAISE.format(error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1 or error.startswith("KeyError")
