"""Calls of the kernels' benchmark in a process of their own."""

import operator
import os
import time

import pytest

from benchmarks.subprocess_calls import CallFailedError, Subprocess


def test_a_process_answers_calls_until_one_fails_and_then_another_does():
    with Subprocess() as run:
        first = run.call(os.getpid, limit_s=60)
        assert run.call(os.getpid, limit_s=60) == first != os.getpid()
        with pytest.raises(CallFailedError, match="ZeroDivisionError: integer division"):
            run.call(operator.floordiv, 1, 0, limit_s=60)
        assert run.call(os.getpid, limit_s=60) != first


def test_a_call_that_hangs_or_ends_its_process_fails_alone():
    with Subprocess() as run:
        with pytest.raises(CallFailedError, match="took longer than 0 s and was stopped"):
            run.call(time.sleep, 60, limit_s=0.1)
        with pytest.raises(CallFailedError, match="its process ended with code 7"):
            run.call(os._exit, 7, limit_s=60)
        assert run.call(operator.add, 1, 2, limit_s=60) == 3
