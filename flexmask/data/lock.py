"""One run at a time writes a folder: a lock of the operating system, which ends with its process.

The file that carries the lock is removed at the end; one that a killed run left carries none.
Processes of that run hold the lock until they have ended too, so that nothing is written any more
when the next run begins.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flexmask.errors import DataError

LOCK = "prepare.lock"
_PATIENCE_S = 5.0  # for the processes of a killed run, which end when they notice
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """A block that no other process is in for the same `folder`, which is made if need be.

    Raises:
        DataError: another one is, and the message names it; or the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder for --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
    with file:
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _locked(folder: Path) -> IO[str]:
    """The lock's file, which names this process; the lock lasts as long as it is open."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        if _try_to_lock(file, folder) and _is_there(file, folder / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        with file:
            if time.monotonic() > until:
                file.seek(0)
                raise DataError(
                    f"{folder}: is being written by another run ({file.read() or 'just begun'}); "
                    "wait for its end, or use another --output"
                )
        time.sleep(0.05)


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`: the run before removes it at its end."""
    try:
        return os.path.samestat(os.stat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try_to_lock(file: IO[str], folder: Path) -> bool:
    """Whether nobody else has the lock; where there are none, that is said, and taken for so."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    warnings.warn(
        f"{folder}: files cannot be locked here; see to it that no other run writes this folder",
        stacklevel=2,
    )
    return True
