"""Trees on disk: many in one safetensors file, each read by itself.

The arrays of all trees of a shard stand end to end, tree after tree. `tree_*` arrays say how many
entries each tree has in them; docs/formats.md lists them all. Loss weights are those of each
sample, from its first target on, kept as runs of equal values; they are the same float64 values
when they come back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from flexmask.errors import DataError
from flexmask.files import atomic_write
from flexmask.tree.tree import Leaf, PrefixTree, Segment

_PARTS = {  # arrays with several entries a tree: what counts them, and their type
    "input_ids": ("tree_tokens", np.int32),
    "segment_lengths": ("tree_segments", np.int32),
    "segment_parents": ("tree_segments", np.int32),
    "sample_segments": ("tree_samples", np.int32),
    "sample_keys": ("tree_samples", np.int64),
    "sample_lengths": ("tree_samples", np.int32),
    "sample_weights": ("tree_samples", np.int32),
    "weight_values": ("tree_weights", np.float64),
    "weight_counts": ("tree_weights", np.int32),
}
_COUNTS = ("tree_tokens", "tree_pairs", "tree_segments", "tree_samples", "tree_weights")


_ROOT = -1  # the parent of a segment at a root
REMAKE = "run the same `flexmask prepare` again, which makes it anew"


class ShardError(DataError):
    """A shard that is missing, cut short or something else."""


def write_shard(
    path: Path, trees: Sequence[PrefixTree], places: Sequence[tuple[int, int]], about: Any
) -> None:
    """Write `trees` to `path`, whole or not at all.

    Args:
        path: the file.
        trees: made of rendered conversations: with tokens, the samples' keys integers.
        places: for each tree, the number of its data file and of its line there, from 1.
        about: plain data to keep with the trees.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    columns = [_parts_of(tree) for tree in trees]
    arrays = {"tree_pairs": np.array([tree.num_pairs for tree in trees], np.int64)}
    for name, (count, dtype) in _PARTS.items():
        values = [own[name] for own in columns]
        arrays[name] = np.concatenate([np.empty(0, dtype), *values])
        arrays[count] = np.array([one.size for one in values], np.int64)
    arrays["tree_places"] = np.array(places, np.int64).reshape(-1, 2)
    data = save(arrays, metadata={"flexmask": json.dumps(about)})
    # The processes of a killed run may still be at the same shard, which has the same bytes.
    with atomic_write(path, f".{os.getpid()}") as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _parts_of(tree: PrefixTree) -> dict[str, np.ndarray]:
    own = [leaf.weights for leaf in tree.leaves if leaf.weights is not None]
    assert len(own) == len(tree.leaves), "rendered trees have tokens"
    weights = np.concatenate(own)
    begins = np.flatnonzero(np.diff(weights, prepend=np.nan))
    parents = [_ROOT if s.parent is None else s.parent for s in tree.segments]
    columns = {
        "input_ids": tree.input_ids,
        "segment_lengths": tree.lengths,
        "segment_parents": parents,
        "sample_segments": [leaf.segment for leaf in tree.leaves],
        "sample_keys": [leaf.key for leaf in tree.leaves],
        "sample_lengths": [tree.sample_length(leaf) for leaf in tree.leaves],
        "sample_weights": [one.size for one in own],
        "weight_values": weights[begins],
        "weight_counts": np.diff(begins, append=weights.size),
    }
    return {name: np.asarray(values, _PARTS[name][1]) for name, values in columns.items()}


class Shard:
    """A file of trees, opened; the arrays stay on disk until a tree is asked for.

    Attributes:
        path: the file.
        about: what was kept with the trees.
        num_tokens, num_pairs: of each tree, int64 [n]; pairs are visible pairs.
        places: data file and line of each tree, int64 [n, 2].

    Raises:
        ShardError: the file is missing, cut short or no shard.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file: Any = safe_open(path, framework="numpy")
            self.about: Any = json.loads((self._file.metadata() or {})["flexmask"])
            counts = {name: self._file.get_tensor(name) for name in _COUNTS}
            self.places = self._file.get_tensor("tree_places")
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            reason = "is missing" if not path.exists() else f"is damaged ({error})"
            raise ShardError(f"{path}: {reason}; {REMAKE}") from None
        self.num_tokens, self.num_pairs = counts["tree_tokens"], counts["tree_pairs"]
        self._ends = {name: np.cumsum(values) for name, values in counts.items()}
        self._counts = counts

    def __len__(self) -> int:
        return self.num_tokens.size

    def tree(self, index: int) -> PrefixTree:
        """The tree number `index`."""
        part = {name: self._part(name, index) for name in _PARTS if name != "sample_lengths"}
        weights = np.repeat(part["weight_values"], part["weight_counts"])
        counts = part["sample_weights"].tolist()
        return PrefixTree(
            tuple(
                Segment(length, None if parent == _ROOT else parent)
                for length, parent in zip(
                    part["segment_lengths"].tolist(), part["segment_parents"].tolist(), strict=True
                )
            ),
            tuple(
                Leaf(segment, key, weights[stop - count : stop])
                for segment, key, stop, count in zip(
                    part["sample_segments"].tolist(),
                    part["sample_keys"].tolist(),
                    accumulate(counts),
                    counts,
                    strict=True,
                )
            ),
            part["input_ids"].astype(np.int64),
        )

    def _part(self, name: str, index: int) -> np.ndarray:
        count, _ = _PARTS[name]
        end = int(self._ends[count][index])
        return self._file.get_slice(name)[end - int(self._counts[count][index]) : end]
