"""What `prepare` writes its shards as: trees for flexmask, or rows for other trainers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flexmask.data.rows import is_weighted, sample_row
from flexmask.data.shards import REMAKE, Shard, ShardError, write_shard
from flexmask.errors import DataError
from flexmask.files import atomic_write
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree

TREES = "trees"


class Made(NamedTuple):
    """A conversation for a shard.

    Attributes:
        place: the number of its data file, and of its line there, from 1.
        where: the same for people, such as "conversations.jsonl:17".
        samples: its samples, their keys integers.
        tree: the tree of these.
    """

    place: tuple[int, int]
    where: str
    samples: list[Sample]
    tree: PrefixTree


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A kind of shards.

    Attributes:
        suffix: of their files.
        write: takes the path, the conversations, and plain data to keep with them, which is
            complete when the last conversation has been taken. The file is whole or not there.
        read_about: that data; ShardError where the file is missing or damaged.
    """

    suffix: str
    write: Callable[[Path, Iterable[Made], dict[str, Any]], None]
    read_about: Callable[[Path], dict[str, Any]]

    def name(self, number: int) -> str:
        """The file of a shard."""
        return f"shard-{number:05d}{self.suffix}"

    def find_shards(self, folder: Path) -> list[Path]:
        """The files of all shards in a folder."""
        return list(folder.glob(f"shard-*{self.suffix}"))

    def find_about(self, path: Path) -> dict[str, Any] | None:
        """The same as `read_about`; None where the file is missing or damaged."""
        try:
            return self.read_about(path)
        except ShardError:
            return None


def _write_trees(path: Path, conversations: Iterable[Made], about: dict[str, Any]) -> None:
    places, trees = [], []
    for made in conversations:
        places.append(made.place)
        trees.append(made.tree)
    write_shard(path, trees, places, about)


def _write_rows(path: Path, conversations: Iterable[Made], about: dict[str, Any]) -> None:
    """A sample a line, and beside the file another with `about` and its size, written last.

    All rows of a folder have the same columns, so that with the weighting "token" DataError is
    raised for a message with a weight of its own.
    """
    weighted = about["weighting"] != "token"
    tag = f".{os.getpid()}"  # the processes of a killed run may still be at the same shard
    with atomic_write(path, tag) as partial, partial.open("w", encoding="utf-8") as file:
        for made in conversations:
            for sample in made.samples:
                if not weighted and is_weighted(sample):
                    raise DataError(
                        f"{made.where}: message {sample.key} has a weight, for which rows have "
                        "loss_weights with --weighting turn and conversation; choose one, or "
                        "remove the weight"
                    )
                row = sample_row(sample, weighted=weighted) | {"where": made.where}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    about = about | {"bytes": path.stat().st_size}
    with atomic_write(_about_path(path), tag) as partial:
        partial.write_text(json.dumps(about), encoding="utf-8")


def _read_rows_about(path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(_about_path(path).read_text("utf-8"))
        if about["bytes"] == path.stat().st_size:
            return about
        reason = "was cut short"
    except (OSError, ValueError, KeyError) as error:
        reason = "is missing" if not path.exists() else f"is damaged ({error})"
    raise ShardError(f"{path}: {reason}; {REMAKE}")


def _about_path(path: Path) -> Path:
    return path.with_suffix(".json")


OUTPUT_FORMATS = {
    TREES: OutputFormat(".safetensors", _write_trees, lambda path: Shard(path).about),
    "samples": OutputFormat(".jsonl", _write_rows, _read_rows_about),
}
