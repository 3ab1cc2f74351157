"""What conversations come in: JSON Lines, plain or compressed, Parquet, splits of `datasets`."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flexmask.data.dataset_split import DatasetSplit
from flexmask.data.values import without_nulls
from flexmask.errors import DataError, need_packages, one_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_ROWS_AT_ONCE = 64

DataFile = Path | DatasetSplit


def read_lines(path: DataFile) -> Iterator[bytes]:
    """The lines of a file, each the JSON text of one record in UTF-8.

    A row of a Parquet file or of `datasets` counts as a line. These cannot tell a key that is null
    from one that is not there; flexmask takes it for not there.

    Args:
        path: a file, in which `.gz`, `.zst` and `.parquet` are known by their ends and all else is
            text, or a split.

    Raises:
        DataError: the file cannot be read, or ends too early; says after which line.
    """
    number = 0
    try:
        for line in _lines(path):
            number += 1
            yield line
    except (EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        if isinstance(error, OSError) and error.errno and error.strerror:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        raise DataError(
            f"{path}: is damaged or was cut short after line {number} ({one_line(error)}); get the "
            "whole file, or write out the lines that can be read"
        ) from None


def _lines(path: DataFile) -> Iterator[bytes]:
    if isinstance(path, DatasetSplit):
        return path.lines()
    return _rows(path) if path.suffix == ".parquet" else _text_lines(path)


def _text_lines(path: Path) -> Iterator[bytes]:
    with ExitStack() as stack:
        if path.suffix == ".gz":
            yield from stack.enter_context(gzip.open(path, "rb"))
        elif path.suffix == ".zst":
            pyarrow = _pyarrow(path)
            file = stack.enter_context(pyarrow.OSFile(str(path)))
            stream = stack.enter_context(pyarrow.CompressedInputStream(file, "zstd"))
            yield from stack.enter_context(io.BufferedReader(stream, 1 << 20))
        else:
            yield from stack.enter_context(path.open("rb"))


def _rows(path: Path) -> Iterator[bytes]:
    _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                yield json.dumps(without_nulls(row), ensure_ascii=False, default=str).encode()


def _pyarrow(path: Path) -> Any:
    need_packages(f"{path}:", "pyarrow")
    import pyarrow

    return pyarrow
