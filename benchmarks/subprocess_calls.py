"""Calls in a process of their own, which lose nothing but themselves when they crash or hang.

A CUDA error leaves a process that can do nothing on the device any more, and a kernel that waits
for ever never returns. So the process that does the work ends with its first failure, and the next
call starts a new one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")

_START_S = 60.0  # at most, until a new process listens


class CallFailedError(Exception):
    """A call that gave no result; the message is the reason, in one line."""


class Subprocess:
    """Calls in one other process after another, as long as one lasts."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Subprocess:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def call(self, function: Callable[..., T], *arguments: Any, limit_s: float | None = None) -> T:
        """The result of the function, which like all its arguments can be pickled.

        Args:
            function: of a module.
            arguments: its own.
            limit_s: seconds that it may take; the start of a process does not count.

        Raises:
            CallFailedError: it raised, ended its process, or took longer.
        """
        connection = self._connection or self._start()
        connection.send((function, arguments))
        if not connection.poll(limit_s):
            self._stop()
            raise CallFailedError(f"took longer than {limit_s:.0f} s and was stopped")
        return self._answer(connection)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        if not self._connection.poll(_START_S):
            self._stop()
            raise CallFailedError(f"a new process did not start within {_START_S:.0f} s")
        self._answer(self._connection)
        return self._connection

    def _answer(self, connection: Connection) -> Any:
        try:
            is_result, answer = connection.recv()
        except EOFError:
            raise CallFailedError(f"its process ended with code {self._stop()}") from None
        if not is_result:
            self._stop()
            raise CallFailedError(answer)
        return answer

    def _stop(self) -> int | None:
        """End the process, at once if it does not do so by itself; returns its exit code."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return None
        connection.close()  # a process that waits for a call reads the end of its input
        process.join(2)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode


def reason_of(failure: BaseException) -> str:
    """The kind of a failure and the first line of its message."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0][:300] if lines else ''}"


def _serve(connection: Connection) -> None:
    """Answer calls until there are no more, or one of them fails."""
    connection.send((True, None))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as failure:
            connection.send((False, reason_of(failure)))
            raise  # the traceback goes to the log
        connection.send((True, answer))
