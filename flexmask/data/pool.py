"""Shards made by several processes, in the order of the data."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from flexmask.data.shard_maker import ShardMaker
from flexmask.data.stretches import Stretch
from flexmask.errors import DataError

_AHEAD = 2  # stretches waiting for each process: the data in memory are so many stretches

_maker: ShardMaker | None = None


def make_shards(maker: ShardMaker, stretches: Iterable[Stretch], num_proc: int) -> Iterator[int]:
    """Make the shard of each stretch; yields how many conversations it holds, in order.

    Raises:
        FlexmaskError: a shard cannot be made; the first such in the order of the data.
    """
    if num_proc == 1:
        yield from map(maker.make, stretches)
        return
    # A forked process has the tokenizer at once; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, _begin_process, (maker,))
    waiting: deque[Future[int]] = deque()
    try:
        for stretch in stretches:
            waiting.append(pool.submit(_make, stretch))
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


def _make(stretch: Stretch) -> int:
    assert _maker is not None
    return _maker.make(stretch)
