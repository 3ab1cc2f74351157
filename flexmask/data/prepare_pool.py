"""Shards made by several processes, in the order of the data."""

from __future__ import annotations

import hashlib
import multiprocessing
import operator
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmask.data.file_formats import DataFile, read_lines
from flexmask.data.files import BadLine, OnBadLine, read_line
from flexmask.data.output_formats import OUTPUT_FORMATS, Made
from flexmask.data.renderer import Rendered, Renderer
from flexmask.errors import DataError
from flexmask.files import disk_errors

SHARD_BYTES = 32 * 2**20  # of text in a shard, if it has several lines
REMEDY = (
    "make room, or free the folder for writing, and run the same command again: finished shards "
    "are kept"
)
COUNTS = (
    *("conversations", "samples", "tokens", "visible_pairs", "sample_tokens", "trained_tokens"),
    *("longest_sample", "empty_thoughts", "greetings"),
)
_AHEAD = 2  # shards waiting for each process: the data in memory are those of so many

Line = tuple[int, int, bytes]  # number of the file, number of the line in it from 1, text


def lines_of_shards(files: Iterable[DataFile], max_lines: int) -> Iterator[list[Line]]:
    """The lines of each shard, at least one; those of all files, in order.

    Raises:
        DataError: a file cannot be read.
    """
    size = 0
    lines: list[Line] = []
    for place, file in enumerate(files):
        for number, text in enumerate(read_lines(file), start=1):
            if lines and (len(lines) == max_lines or size + len(text) > SHARD_BYTES):
                yield lines
                size, lines = 0, []
            lines.append((place, number, text))
            size += len(text)
    if lines:
        yield lines


@dataclass(frozen=True, slots=True)
class ShardMaker:
    """Makes the shards of a folder.

    Attributes:
        folder: where they go.
        files: the data files' names, which become the places of errors and trees.
        renderer: renders the conversations.
        on_bad_line: "error" or "skip".
        output_format: what shards are written as, a key of `OUTPUT_FORMATS`.
    """

    folder: Path
    files: Sequence[str]
    renderer: Renderer
    on_bad_line: OnBadLine
    output_format: str

    def make(self, number: int, lines: Sequence[Line]) -> int:
        """Write shard `number` unless it is finished; returns how many conversations it holds.

        Raises:
            FlexmaskError: a line cannot be used, the shard is finished and of other lines, or it
                cannot be written.
        """
        output = OUTPUT_FORMATS[self.output_format]
        path = self.folder / output.name(number)
        digest = _digest(lines)
        about = output.find_about(path)
        if about is None:
            about = {
                "digest": digest,
                "weighting": self.renderer.weighting,
                "counts": dict.fromkeys(COUNTS, 0),
                "unused_keys": Counter(),
                "bad_lines": [],
            }
            with disk_errors(path, REMEDY):
                output.write(path, self._render(lines, about), about)
        elif about["digest"] != digest:
            raise changed_data(path)
        return int(about["counts"]["conversations"])

    def _render(self, lines: Sequence[Line], about: dict[str, Any]) -> Iterator[Made]:
        """Each conversation; counts and bad lines go into `about` on the way."""
        for file, line, text in lines:
            where = f"{self.files[file]}:{line}"
            found = read_line(text, where, self.renderer.render, self.renderer.data_columns)
            if isinstance(found, BadLine):
                if self.on_bad_line == "error" and found.error is not None:
                    raise found.error
                about["bad_lines"].append({"where": where, "reason": found.reason})
            elif found is not None:
                made = Made((file, line), where, found.samples, found.tree)
                add_counts(about["counts"], _count(made, found))
                about["unused_keys"].update(found.unused_keys)
                yield made


def add_counts(counts: dict[str, int], others: Mapping[str, int]) -> None:
    """Add counts to those of other conversations; of "longest" ones the larger is taken."""
    for name, value in others.items():
        join = max if name.startswith("longest") else operator.add
        counts[name] = join(counts[name], value)


def _count(made: Made, found: Rendered) -> dict[str, int]:
    """The counts of a manifest for one conversation."""
    lengths = list(map(len, made.samples))
    return {
        "conversations": 1,
        "samples": len(lengths),
        "tokens": made.tree.num_tokens,
        "visible_pairs": made.tree.num_pairs,
        "sample_tokens": sum(lengths),
        "trained_tokens": sum(sample.num_trained for sample in made.samples),
        "longest_sample": max(lengths),
        "empty_thoughts": found.num_empty_thoughts,
        "greetings": int(found.conversation.has_greeting),
    }


def changed_data(path: Path) -> DataError:
    """The error for a finished shard that the data do not make any more."""
    return DataError(
        f"{path}: was made of other lines: the data have changed since; use another --output"
    )


def _digest(lines: Iterable[Line]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for place, line, text in lines:
        digest.update(f"{place}:{line}:{len(text)}:".encode())
        digest.update(text)
    return digest.hexdigest()


def make_shards(maker: ShardMaker, shards: Iterable[list[Line]], num_proc: int) -> Iterator[int]:
    """Make the shard of each list of lines; yields how many conversations it holds, in order.

    Raises:
        FlexmaskError: a shard cannot be made; the first such in the order of the data.
    """
    if num_proc == 1:
        for number, lines in enumerate(shards):
            yield maker.make(number, lines)
        return
    # A forked process has the tokenizer at once; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, _begin_process, (maker,))
    waiting: deque[Future[int]] = deque()
    try:
        for number, lines in enumerate(shards):
            waiting.append(pool.submit(_make, number, lines))
            if len(waiting) > _AHEAD * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"{maker.folder}: one of the {num_proc} processes was killed, perhaps for want of "
            "memory; run the same command again, with a smaller --num_proc: finished shards are "
            "kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_maker: ShardMaker | None = None  # of a process of the pool


def _begin_process(maker: ShardMaker) -> None:
    global _maker
    _maker = maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what is to be done
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the first process is gone: nobody would collect what is made here."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(number: int, lines: list[Line]) -> int:
    assert _maker is not None
    return _maker.make(number, lines)
