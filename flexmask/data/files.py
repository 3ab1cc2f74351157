"""Data files: conversations, one a line or a row, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from flexmask.data.file_formats import SUFFIXES, read_lines
from flexmask.data.message_fields import parse_json
from flexmask.data.messages import Conversation, parse_conversation
from flexmask.errors import DataError

ON_BAD_LINE = ("error", "skip")
SETTINGS = "settings.json"  # in a folder that was prepared


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was skipped.

    Attributes:
        line: its number in the file, from 1.
        reason: why, in one line.
    """

    line: int
    reason: str


@dataclass(slots=True)
class ConversationFile:
    """The conversations of a file, in order, read anew by every iteration.

    Attributes:
        path: the file, in a format of `read_lines`.
        on_bad_line: "error" raises at the first bad line, "skip" lists it and goes on.
        bad_lines: the lines skipped so far by the latest iteration.
    """

    path: Path
    on_bad_line: str = "error"
    bad_lines: list[BadLine] = field(default_factory=list)

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations; DataError for a bad line, and for a file that has none."""
        self.bad_lines.clear()
        num_read = 0
        for number, line in enumerate(read_lines(self.path), start=1):
            conversation = self._read_line(line, number)
            if conversation is not None:
                num_read += 1
                yield conversation
        if self.bad_lines and not num_read:
            raise DataError(
                f"{self.path}: all {len(self.bad_lines)} lines are bad; "
                f"the first: {self.bad_lines[0].reason}"
            )
        if not num_read:
            raise DataError(f"{self.path}: the file is empty; write one conversation a line")

    def _read_line(self, line: bytes, number: int) -> Conversation | None:
        try:
            return parse_line(line, f"{self.path}:{number}")
        except DataError as error:
            if self.on_bad_line == "error":
                raise
            self.bad_lines.append(BadLine(number, str(error)))
            return None


def read_conversations(
    path: str | os.PathLike[str], *, on_bad_line: str = "error"
) -> ConversationFile:
    """Return the conversations of a file, to iterate over.

    Args:
        path: JSON Lines (plain, .gz or .zst) or Parquet; each conversation in any format of
            `parse_conversation`.
        on_bad_line: "error", or "skip" to list bad lines in `.bad_lines` and go on.

    Raises:
        DataError: the file does not exist or is a directory; while iterating, a bad line (with its
            number), or a file without a conversation.
    """
    if on_bad_line not in ON_BAD_LINE:
        raise DataError(f"on_bad_line must be 'error' or 'skip', got {on_bad_line!r}")
    path = Path(path)
    _check_not_prepared(path)
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name a file of conversations in it")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return ConversationFile(path, on_bad_line)


def find_data_files(data: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that `data` names, in the order of `data`, and by name where it names several.

    Args:
        data: files, folders (all data files in them, at any depth) and patterns such as
            "part-*.jsonl.zst".

    Raises:
        DataError: a name stands for no file, or a file is named twice.
    """
    found: list[Path] = []
    for entry in data:
        name = os.fspath(entry)
        path = Path(name)
        _check_not_prepared(path)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        elif path.exists():
            files = [path]
        else:
            files = sorted(map(Path, glob(name, recursive=True)))
        if not files:
            what = "holds no data file" if path.is_dir() else "no such file"
            raise DataError(f"{name}: {what}; flexmask reads {', '.join(SUFFIXES)}")
        found.extend(files)
    seen: set[Path] = set()
    for file in found:
        if file.resolve() in seen:
            raise DataError(f"{file}: is named twice; name every file once")
        seen.add(file.resolve())
    return found


def _check_not_prepared(path: Path) -> None:
    if (path / SETTINGS).is_file():
        raise DataError(
            f"{path}: is a folder of `flexmask prepare`, which only `flexmask train` reads, as all "
            "of its data; name the files that it was made from"
        )


def parse_line(line: bytes, where: str) -> Conversation | None:
    """The conversation of one line, None for a blank one.

    Args:
        line: JSON text in UTF-8.
        where: the place of the line, which begins every error.

    Raises:
        DataError: the line is not in an accepted format.
    """
    text = _decode(line, where)
    return parse_conversation(_parse(text, where), where) if text.strip() else None


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; convert the file") from None


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text.strip(), "the line")
    except DataError as error:
        remedy = "write one JSON object a line"
        if text.strip() in ("[", "{"):  # as the first line of a document over many has it
            remedy += ", such as `jq -c '.[]' FILE.json > FILE.jsonl` makes of an array"
        raise DataError(f"{where}: {error}; {remedy}") from None
