"""A folder that `flexmask prepare` made, as a data set for training.

Nothing of it is read before it is needed, except how large each tree is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexmask.data.files import BadLine
from flexmask.data.renderer import RENDERING, Renderer
from flexmask.data.shards import Shard
from flexmask.data.sources import SETTINGS
from flexmask.data.tokenize import tokenizer_fingerprint
from flexmask.data.trees import summarize
from flexmask.errors import DataError
from flexmask.tree.tree import PrefixTree

FORMAT = 6
MANIFEST = "manifest.json"
LEFT_OUT = "left_out.jsonl"


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that `flexmask prepare` made, or has begun."""
    return (Path(path) / SETTINGS).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a prepared folder holds.

    Raises:
        DataError: the folder is not finished, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not finished" if is_prepared(folder) else "is no folder of `flexmask prepare`"
        raise DataError(
            f"{folder}: {what}; run `flexmask prepare ... --output {folder}` to its end"
        )
    manifest = json.loads(path.read_text("utf-8"))
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{folder}: has format {manifest.get('format')}, this flexmask reads {FORMAT}; "
            "prepare the data again"
        )
    return manifest


class PreparedDataset(Sequence[PrefixTree]):
    """The trees of a prepared folder, read from disk one by one.

    Args:
        folder: the folder.
        manifest: its manifest.
        chosen: the trees taken, by their number in the folder, int64 [n]; all where None.

    Attributes:
        num_tokens: of each tree, int64 [n].
        num_pairs: visible pairs of each tree, int64 [n].
        bad_lines: lines that were skipped when the folder was made.
        unused_keys: how many conversations have each key that nothing is made of.
        weights: as in `repeat_by_weight`.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], chosen: np.ndarray | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.unused_keys: dict[str, int] = manifest["unused_keys"]
        self.weights = dict(zip(manifest["files"], manifest["weights"], strict=True))
        # Safetensors maps them into memory.
        self._shards = shards = [Shard(folder / shard["name"]) for shard in manifest["shards"]]
        self._ends = np.cumsum([len(shard) for shard in shards])
        self._chosen = np.arange(self._ends[-1]) if chosen is None else chosen
        self.num_tokens = np.concatenate([shard.num_tokens for shard in shards])[self._chosen]
        self.num_pairs = np.concatenate([shard.num_pairs for shard in shards])[self._chosen]

    def __len__(self) -> int:
        return self._chosen.size

    def __reduce__(self) -> Any:
        return PreparedDataset, (self.folder, self.manifest, self._chosen)

    def __getitem__(self, index: Any) -> Any:
        """The tree number `index`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"tree {index} of {len(self)}")
        shard, number = self._find(index)
        return shard.tree(number)

    def place(self, index: int) -> str:
        """Where tree `index` comes from, such as "conversations.jsonl:17"."""
        shard, number = self._find(index)
        file, line = shard.places[number].tolist()
        return f"{self.manifest['files'][file]}:{line}"

    @property
    def bad_lines(self) -> list[BadLine]:
        """Lines that were skipped when the folder was made."""
        with (self.folder / LEFT_OUT).open(encoding="utf-8") as lines:
            bad = [json.loads(line) for line in lines]
        return [BadLine(int(b["where"].rpartition(":")[2]), b["reason"]) for b in bad]

    def digest(self) -> str:
        """A digest of the trees and their order, from what the folder was made of."""
        made_of = {
            name: self.manifest[name] for name in ("flexmask", "tokenizer", *RENDERING, "shards")
        }
        digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=8)
        digest.update(self._chosen.astype(np.int64).tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """What the folder holds and what was left out, in one line."""
        return f"{summarize(self.manifest)}, prepared"

    def take(self, indices: np.ndarray) -> PreparedDataset:
        """The trees of these indices."""
        return PreparedDataset(self.folder, self.manifest, self._chosen[indices])

    def _find(self, index: int) -> tuple[Shard, int]:
        number = int(self._chosen[index])
        shard = int(np.searchsorted(self._ends, number, side="right"))
        begin = 0 if shard == 0 else int(self._ends[shard - 1])
        return self._shards[shard], number - begin


def open_prepared(
    folder: str | os.PathLike[str], tokenizer: Any, **settings: Any
) -> PreparedDataset:
    """The trees of a prepared folder, for a model with this tokenizer; each once.

    The weights of its data are what `flexmask train` repeats them by.

    Args:
        folder: the folder.
        tokenizer: the model's, with its chat template.
        settings: attributes of `Renderer`; held to those of the folder, unless they are None.

    Raises:
        DataError: the folder is not finished or damaged, or was made with another tokenizer,
            chat template or setting.
    """
    asked = Renderer(tokenizer, **settings)
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["output_format"] != "trees":
        raise DataError(
            f"{folder}: holds samples for other trainers; to train with flexmask, prepare the data "
            "with --output_format trees"
        )
    remedy = f"prepare the data again into another folder, or train as {folder} was made"
    if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise DataError(
            f"{folder}: was made with another tokenizer or chat template than the model's; {remedy}"
        )
    for name, value in asked.settings.items():
        if getattr(asked, name) is not None and manifest[name] != value:
            raise DataError(
                f"{folder}: was made with {name} {manifest[name]!r}, not {value!r}; {remedy}"
            )
    return PreparedDataset(folder, manifest)
