"""The model of how programs fill a GPU, and its table in docs/kernels.md."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from benchmarks.kernel_schedule import makespan, schedule_table

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"

durations = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(durations, st.integers(1, 6))
def test_processors_idle_for_no_longer_than_the_longest_program(durations, processors):
    took, share, longest = makespan(durations, processors), sum(durations), max(durations)
    assert max(share / processors, longest) <= took
    assert took <= (share - longest) / processors + longest  # Graham's bound, any order


@given(durations)
def test_one_processor_runs_one_program_after_another(durations):
    assert makespan(durations, 1) == sum(durations)


def test_docs_table_is_what_the_model_says():
    text = DOCUMENT.read_text()
    start, stop = (f"<!-- {word}: schedule -->\n" for word in ("begin", "end"))
    before, rest = text.split(start)
    table, after = rest.split(stop)
    if os.environ.get("FLEXMASK_WRITE_DOCS"):
        DOCUMENT.write_text(before + start + schedule_table() + stop + after)
    else:
        assert table == schedule_table(), "run `make docs`"
