"""Data files: conversations, one a line or a row, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from flexmask.data.file_formats import DataFile, read_lines
from flexmask.data.messages import Conversation, parse_conversation
from flexmask.data.sources import check_not_prepared
from flexmask.data.values import parse_json
from flexmask.errors import DataError, FlexmaskError, LeftOutError

T = TypeVar("T")
OnBadLine = Literal["error", "skip"]
# How a file begins that is no JSON Lines, and what to do with it.
_UTF_16 = "the file is UTF-16; convert it, as `iconv -f UTF-16 -t UTF-8` does"
_OTHER_FORMATS = {
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"\x1f\x8b": "the file is compressed by gzip; let its name end in .jsonl.gz",
    b"\x28\xb5\x2f\xfd": "the file is compressed by zstd; let its name end in .jsonl.zst",
    b"PAR1": "the file is Parquet; let its name end in .parquet",
}
_OVER_LINES = {"[": "'.[]'", "{": "."}  # first line of a document over many: what jq is to do
_LINES_AT_ONCE = 32  # of each rank, between two exchanges


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be used.

    Attributes:
        line: its number in the file, from 1.
        reason: why, in one line.
        error: what was raised; None where the line was skipped by an earlier run, or is left out
            as the caller asked.
    """

    line: int
    reason: str
    error: FlexmaskError | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that read the same files together; one process alone by default.

    Attributes:
        rank: of this process.
        size: how many there are.
        gather: takes an object of each process, and returns all of them on every process.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


def read_files(
    paths: Iterable[DataFile],
    use: Callable[[Conversation], T],
    *,
    on_bad_line: OnBadLine = "error",
    ranks: Ranks | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[T | BadLine]:
    """What `use` makes of every conversation of some files, and the bad lines, in order.

    Args:
        paths: what `find_data_files` finds.
        use: such as `Renderer.tree`; what it refuses is a bad line too.
        on_bad_line: "error" raises at the first bad line, "skip" yields it and goes on.
        ranks: each process reads its share of the lines, and gets what the others made.
        columns: as in `parse_conversation`.

    Raises:
        FlexmaskError: a file cannot be read, a line of it cannot be used, or none can; the same on
            every rank.
    """
    check_on_bad_line(on_bad_line)
    for path in paths:
        num_used, first = 0, None
        for item in _read_file(path, use, ranks or Ranks(), columns):
            if not isinstance(item, BadLine):
                num_used += 1
            elif on_bad_line == "error" and item.error is not None:
                raise item.error
            else:
                first = first or item
            yield item
        if first is not None and not num_used:
            raise DataError(f"{path}: no conversation can be used; the first: {first.reason}")
        if not num_used:
            raise DataError(f"{path}: the file is empty; write one conversation a line")


def _read_file(
    path: DataFile,
    use: Callable[[Conversation], T],
    ranks: Ranks,
    columns: Mapping[str, str] | None,
) -> Iterator[T | BadLine]:
    """The same of one file; every rank reads each `ranks.size`-th line."""
    lines = iter(enumerate(read_lines(path), start=1))
    most = 1 if ranks.size == 1 else _LINES_AT_ONCE * ranks.size
    num_lines = most
    while num_lines == most:
        chunk: list[tuple[int, bytes]] = []
        failure = None
        try:
            chunk.extend(islice(lines, most))
        except FlexmaskError as error:
            failure = error  # the lines before it have been read
        own = [
            read_line(text, f"{path}:{number}", use, columns)
            for number, text in chunk[ranks.rank :: ranks.size]
        ]
        sizes, items, failures = zip(*ranks.gather((len(chunk), own, failure)), strict=True)
        num_lines = min(sizes)
        for index in range(num_lines):
            item = items[index % ranks.size][index // ranks.size]
            if item is not None:
                yield item
        for failure in filter(None, failures):
            raise failure
        if len({*sizes}) > 1:
            raise DataError(f"{path}: is not the same file for every process; give all the same")


def read_line(
    line: bytes,
    where: str,
    use: Callable[[Conversation], T],
    columns: Mapping[str, str] | None = None,
) -> T | BadLine | None:
    """What `use` makes of the conversation of one line, None for a blank one.

    Args:
        line: JSON text in UTF-8.
        where: the place of the line, such as "conversations.jsonl:17", which begins every error.
        use: as in `read_files`.
        columns: as in `parse_conversation`.
    """
    try:
        text = _decode(line, where)
        if not text.strip():
            return None
        record = _parse(text, where)
        return use(parse_conversation(record, where, keep_nulls=True, columns=columns))
    except FlexmaskError as error:
        is_bad = not isinstance(error, LeftOutError)
        return BadLine(int(where.rpartition(":")[2]), str(error), error if is_bad else None)


def check_on_bad_line(on_bad_line: str) -> None:
    """Raise DataError for what is no policy."""
    if on_bad_line not in get_args(OnBadLine):
        raise DataError(f"on_bad_line must be 'error' or 'skip', got {on_bad_line!r}")


@dataclass(slots=True)
class ConversationFile:
    """The conversations of a file, in order, read anew by every iteration.

    Attributes:
        path: the file, in a format of `read_lines`.
        on_bad_line: "error" raises at the first bad line, "skip" lists it and goes on.
        columns: as in `parse_conversation`.
        bad_lines: the lines skipped so far by the latest iteration.
    """

    path: Path
    on_bad_line: OnBadLine = "error"
    columns: Mapping[str, str] | None = None
    bad_lines: list[BadLine] = field(default_factory=list)

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations; DataError for a bad line, and for a file that has none."""
        self.bad_lines.clear()
        options: dict[str, Any] = {"on_bad_line": self.on_bad_line, "columns": self.columns}
        for item in read_files([self.path], lambda own: own, **options):
            if isinstance(item, BadLine):
                self.bad_lines.append(item)
            else:
                yield item


def read_conversations(
    path: str | os.PathLike[str],
    *,
    on_bad_line: OnBadLine = "error",
    columns: Mapping[str, str] | None = None,
) -> ConversationFile:
    """Return the conversations of a file, to iterate over.

    Args:
        path: JSON Lines (plain, .gz or .zst) or Parquet; each conversation in any format of
            `parse_conversation`.
        on_bad_line: "error", or "skip" to list bad lines in `.bad_lines` and go on.
        columns: what the data call each of flexmask's names, such as {"messages": "chat"}.

    Raises:
        DataError: the file does not exist or is a directory; while iterating, a bad line (with its
            number), or a file without a conversation.
    """
    check_on_bad_line(on_bad_line)
    path = Path(path)
    check_not_prepared(path)
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name a file of conversations in it")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return ConversationFile(path, on_bad_line, columns)


def _decode(line: bytes, where: str) -> str:
    for start, what in _OTHER_FORMATS.items():
        if line.startswith(start):
            raise DataError(f"{where}: {what}")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte {error.start}; convert the file, as "
            "`iconv -f LATIN1 -t UTF-8` does for Latin-1"
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text.strip(), "the line")
    except DataError as error:
        remedy = "write one JSON object a line"
        if text.strip() in _OVER_LINES:
            remedy += f", such as `jq -c {_OVER_LINES[text.strip()]} FILE.json > FILE.jsonl` makes"
        raise DataError(f"{where}: {error}; {remedy}") from None
