"""Files that are written whole or not at all, and what is checked of paths before a long run."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flexmask.errors import DataError, one_line

LOCK = "_flexmask.lock"  # the Trainer uploads nothing whose name begins so
_PATIENCE_S = 5.0  # for a run that is about to end
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def atomic_write(path: str | os.PathLike[str], tag: str = "") -> Iterator[Path]:
    """A temporary path beside `path`: it takes its name when the block ends well, else it goes.

    `tag` begins its suffix, and tells apart those of processes that write the same file.
    """
    partial = Path(f"{os.fspath(path)}{tag}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(data: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def disk_errors(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """A block that writes to `path`, and raises DataError, of one line, if the disk refuses.

    `remedy` is for a disk that is full or locked; what has gone was removed by others.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        if error.errno == errno.ENOENT:
            reason += f": {error.filename}" if error.filename else ""
            remedy = "another program, or a second run, has removed it: end that, and run again"
        raise DataError(f"{path}: cannot be written: {reason}; {remedy}") from error


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """A block that no other process is in for the same `folder`, which is made if need be.

    The lock is one of the operating system, which ends with its process. At the end of the block
    its file goes, and the folder where it was made for nothing.

    Raises:
        DataError: another process is in such a block, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    check_folder(folder, "--output")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        raise DataError(
            f"{folder}: is being written by another run; wait for its end, or use another --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            with disk_errors(folder, "make room, or use another --output"):
                raise
        warnings.warn(
            f"{folder}: files cannot be locked here; see to it that no other run writes this "
            "folder",
            stacklevel=2,
        )
    try:
        yield
    finally:
        with suppress(OSError):  # Windows leaves this to the release
            (folder / LOCK).unlink()
        lock.release()
        with suppress(OSError):  # up to a folder that holds something
            for path in made:
                path.rmdir()


def check_folder(path: str | os.PathLike[str], option: str) -> None:
    """Raise DataError, before a long run, unless a folder is at `path` or can be made there."""
    target = Path(path)
    there = next(one for one in (target, *target.parents) if one.exists())
    if not there.is_dir():
        raise DataError(f"{there}: is a file; name a folder for {option}")
    if not os.access(there, os.W_OK):
        raise DataError(f"{there}: cannot be written to; name another folder for {option}")


def check_target(path: str | os.PathLike[str], option: str) -> None:
    """Raise DataError, before a long run, unless a file can be written to `path`."""
    target = Path(path)
    if target.is_dir():
        raise DataError(f"{target}: is a folder; name a file for {option}")
    if not target.parent.is_dir():
        raise DataError(f"{target}: no such folder; make it, or name another file for {option}")
    if not os.access(target.parent, os.W_OK):
        raise DataError(f"{target}: the folder cannot be written to; name another for {option}")
