"""The data cut into stretches of lines, one for each shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexmask.data.file_formats import read_lines

SHARD_LINES = 1000  # a shard ends after so many lines,
SHARD_BYTES = 32 * 2**20  # or before it has more text than this

Line = tuple[int, int, bytes]  # number of the file, number of the line in it from 1, text


@dataclass(frozen=True, slots=True)
class Stretch:
    """The lines of one shard.

    Attributes:
        number: of the shard, from 0.
        lines: at least one.
        digest: of the texts and where they stand.
    """

    number: int
    lines: list[Line]
    digest: str


def stretches(files: Sequence[Path], max_lines: int = SHARD_LINES) -> Iterator[Stretch]:
    """The lines of all files, in order, cut into stretches; one is held at a time.

    Raises:
        DataError: a file cannot be read.
    """
    number, size = 0, 0
    lines: list[Line] = []
    for place, file in enumerate(files):
        for line, text in enumerate(read_lines(file), start=1):
            if lines and (len(lines) == max_lines or size + len(text) > SHARD_BYTES):
                yield Stretch(number, lines, _digest(lines))
                number, size, lines = number + 1, 0, []
            lines.append((place, line, text))
            size += len(text)
    if lines:
        yield Stretch(number, lines, _digest(lines))


def _digest(lines: Iterable[Line]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for place, line, text in lines:
        digest.update(f"{place}:{line}:{len(text)}:".encode())
        digest.update(text)
    return digest.hexdigest()
