"""Shards made by several processes, in the order of the data."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from flexmask.data.file_formats import read_lines
from flexmask.data.files import BadLine, OnBadLine, read_line
from flexmask.data.prepared import shard_name
from flexmask.data.shards import write_shard
from flexmask.data.trees import Renderer
from flexmask.errors import DataError
from flexmask.tree.tree import PrefixTree, build_tree

SHARD_LINES = 1000  # a shard ends after so many lines,
SHARD_BYTES = 32 * 2**20  # or before it has more text than this
_AHEAD = 2  # shard inputs waiting for each process: the data in memory are so many of them

Line = tuple[int, int, bytes]  # number of the file, number of the line in it from 1, text


@dataclass(frozen=True, slots=True)
class ShardInput:
    """The lines of one shard.

    Attributes:
        number: of the shard, from 0.
        lines: at least one.
        digest: of the texts and where they stand.
    """

    number: int
    lines: list[Line]
    digest: str


def shard_inputs(files: Sequence[Path], max_lines: int) -> Iterator[ShardInput]:
    """The lines of all files, in order, cut for the shards; those of one are held at a time.

    Raises:
        DataError: a file cannot be read.
    """
    number, size = 0, 0
    lines: list[Line] = []
    for place, file in enumerate(files):
        for line, text in enumerate(read_lines(file), start=1):
            if lines and (len(lines) == max_lines or size + len(text) > SHARD_BYTES):
                yield ShardInput(number, lines, _digest(lines))
                number, size, lines = number + 1, 0, []
            lines.append((place, line, text))
            size += len(text)
    if lines:
        yield ShardInput(number, lines, _digest(lines))


def _digest(lines: Iterable[Line]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for place, line, text in lines:
        digest.update(f"{place}:{line}:{len(text)}:".encode())
        digest.update(text)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ShardMaker:
    """Makes the shards of a folder.

    Attributes:
        folder: where they go.
        files: the data files' names, which become the places of errors and trees.
        renderer: renders the conversations.
        on_bad_line: "error" or "skip".
    """

    folder: Path
    files: tuple[str, ...]
    renderer: Renderer
    on_bad_line: OnBadLine = "error"

    def make(self, shard_input: ShardInput) -> int:
        """Write the shard of `shard_input`; returns how many conversations it holds.

        Raises:
            FlexmaskError: a line cannot be used, or the shard cannot be written.
        """
        trees: list[PrefixTree] = []
        places: list[tuple[int, int]] = []
        num_trained = 0
        bad_lines: list[dict[str, str]] = []
        for file, line, text in shard_input.lines:
            where = f"{self.files[file]}:{line}"
            samples = read_line(text, where, self.renderer.samples)
            if isinstance(samples, BadLine):
                if self.on_bad_line == "error" and samples.error is not None:
                    raise samples.error
                bad_lines.append({"where": where, "reason": samples.reason})
            elif samples is not None:
                trees.append(build_tree(samples))
                places.append((file, line))
                num_trained += sum(sample.num_trained for sample in samples)
        about = {
            "digest": shard_input.digest,
            "num_sample_tokens": sum(tree.num_sample_tokens for tree in trees),
            "num_trained_tokens": num_trained,
            "bad_lines": bad_lines,
        }
        path = self.folder / shard_name(shard_input.number)
        try:
            write_shard(path, trees, places, about)
        except OSError as error:
            reason = error.strerror or os.strerror(error.errno or 0)
            raise DataError(
                f"{path}: cannot be written: {reason}; make room, or free the folder for writing, "
                "and run the same command again: finished shards are kept"
            ) from None
        return len(trees)


def make_shards(maker: ShardMaker, inputs: Iterable[ShardInput], num_proc: int) -> Iterator[int]:
    """Make the shard of each input; yields how many conversations it holds, in order.

    Raises:
        FlexmaskError: a shard cannot be made; the first such in the order of the data.
    """
    if num_proc == 1:
        yield from map(maker.make, inputs)
        return
    # A forked process has the tokenizer at once; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, _begin_process, (maker,))
    waiting: deque[Future[int]] = deque()
    try:
        for shard_input in inputs:
            waiting.append(pool.submit(_make, shard_input))
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


def _make(shard_input: ShardInput) -> int:
    assert _maker is not None
    return _maker.make(shard_input)
