"""Trees packed into rows, and rows stacked into batches.

A row is a forest: trees end to end, each heavy-first. Nothing of one is visible to another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmask.errors import DataError
from flexmask.packing.fill import fill_rows
from flexmask.packing.fitting import FittedTrees, Overflow, SplitCount, check_budget
from flexmask.tree.intervals import find_parents
from flexmask.tree.layout import (
    IGNORE_INDEX,
    Layout,
    lay_out,
    shifted_targets,
    token_index,
)
from flexmask.tree.tree import PrefixTree, check_trees

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of L packed tokens; all arrays are 1-D, of length L.

    Attributes:
        input_ids: int64.
        position_ids: int64; depth of the token in its tree.
        shift_labels: int64; the token that this position predicts, -100 where nothing is trained.
        loss_weights: float64; how much that prediction counts, 0 where nothing is trained.
        subtree_end: int32; one past the token's last descendant in the row.
        sample_indices: for each sample, the packed positions of its tokens, in its own order.
        keys: the samples' keys.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    shift_labels: np.ndarray
    loss_weights: np.ndarray
    subtree_end: np.ndarray
    sample_indices: tuple[np.ndarray, ...]
    keys: tuple[Hashable, ...]

    @classmethod
    def empty(cls) -> PackedRow:
        """A row without tokens: in a batch, padding alone."""
        ids = np.empty(0, np.int64)
        return cls(ids, ids, ids, np.empty(0), np.empty(0, np.int32), (), ())

    @classmethod
    def from_trees(cls, trees: Sequence[PrefixTree]) -> PackedRow:
        """The row that holds `trees` in the order given.

        Raises:
            DataError: no trees, or a tree without tokens.
        """
        if not trees:
            raise DataError("from_trees needs at least one tree, got none; use PackedRow.empty()")
        columns: list[tuple[np.ndarray, ...]] = []
        indices: list[np.ndarray] = []
        offset = 0
        for tree in trees:
            if tree.input_ids is None:
                raise DataError("a tree without tokens cannot be packed; build it from samples")
            layout = lay_out(tree)
            ids = np.empty_like(tree.input_ids)
            ids[token_index(tree, layout)] = tree.input_ids
            ends = layout.subtree_end + np.int32(offset)
            columns.append((ids, layout.position_ids, *shifted_targets(tree, layout), ends))
            indices.extend(sample_indices(tree, layout, offset))
            offset += tree.num_tokens
        keys = tuple(leaf.key for tree in trees for leaf in tree.leaves)
        ids, positions, labels, weights, ends = map(np.concatenate, zip(*columns, strict=True))
        return cls(ids, positions, labels, weights, ends, tuple(indices), keys)

    def __len__(self) -> int:
        return self.input_ids.size

    def __repr__(self) -> str:
        return (
            f"PackedRow(samples={len(self.keys):,}, tokens={len(self):,}, "
            f"trained={self.num_trained:,})"
        )

    @property
    def num_trained(self) -> int:
        """Number of positions that predict a trained token."""
        return int(np.count_nonzero(self.shift_labels != IGNORE_INDEX))

    @cached_property
    def predicted_from(self) -> np.ndarray:
        """The packed position that predicts each token, int64 [L]; -1 where nothing does.

        That is the token before it in its samples. Several tokens may come after one position.
        """
        return find_parents(self.subtree_end)

    @cached_property
    def sample_counts(self) -> np.ndarray:
        """How many samples hold each token, int32 [L]."""
        counts = np.zeros(len(self), np.int32)
        for index in self.sample_indices:
            counts[index] += 1
        return counts

    def to_batch(self) -> dict[str, Tensor]:
        """The row as a batch: a dict of [1, L] tensors, see `stack_rows`."""
        return stack_rows([self])

    def gather(self, values: Any) -> list[Any]:
        """Per-token values of the row, handed back sample by sample.

        Args:
            values: array or tensor [L, ...] in packed order, such as log-probabilities.

        Returns:
            For each sample an array or tensor [n, ...] in the sample's own token order. Tokens that
            samples share appear in each of them.

        Raises:
            DataError: the first dimension of `values` is not L.
        """
        if len(values) != len(self):
            raise DataError(
                f"gather: values must have {len(self)} entries, one per token of the row, "
                f"got {len(values)}"
            )
        return [values[index] for index in self.sample_indices]

    def scatter(self, values: Sequence[Any]) -> np.ndarray:
        """Per-sample constants summed onto the tokens of the row: `gather` the other way round.

        A token that samples share gets the sum of what they say. So a loss that is linear in
        log-probabilities, with weights or advantages of any sign, is one product over the row:
        `(row.scatter(a) * x).sum()` is the sum of `(a_i * x_i).sum()` over the samples, where
        `x_i` are those of `row.gather(x)`.

        Args:
            values: for each sample one array or CPU tensor [n], in its own token order.

        Returns:
            float64 [L], in packed order.

        Raises:
            DataError: other numbers of samples or tokens than the row has, or values that require
                a gradient.
        """
        if len(values) != len(self.keys):
            raise DataError(
                f"scatter: values must hold {len(self.keys)} arrays, one per sample of the row, "
                f"got {len(values)}"
            )
        total = np.zeros(len(self))
        for key, index, given in zip(self.keys, self.sample_indices, values, strict=True):
            if np.shape(given) != index.shape:
                raise DataError(
                    f"scatter: sample {key!r} must have {index.size} values, one per token, "
                    f"got the shape {tuple(np.shape(given))}; an advantage of the whole sample is "
                    "`advantage * sample.loss_weights`"
                )
            if getattr(given, "requires_grad", False):
                raise DataError(
                    f"scatter: the values of sample {key!r} must be constants, got a tensor that "
                    "requires a gradient; detach it, or form the loss from what gather gives"
                )
            total[index] += np.asarray(given)
        return total


class PackedRows(list[PackedRow]):
    """The rows that `pack` made.

    Attributes:
        dropped: keys of the samples that fit in none.
        split: what cutting trees larger than the budget came to.
    """

    def __init__(
        self,
        rows: Iterable[PackedRow],
        dropped: tuple[Hashable, ...] = (),
        split: SplitCount | None = None,
    ) -> None:
        super().__init__(rows)
        self.dropped = dropped
        self.split = split or SplitCount()


def pack(
    trees: Iterable[PrefixTree], max_tokens: int | None = None, *, on_overflow: Overflow = "split"
) -> PackedRows:
    """The rows that hold `trees`, each of at most `max_tokens` tokens.

    As few rows as `fill_rows` finds, of about the same number of tokens, so that a batch of them
    has little padding; or, where that needs fewer, the trees in the order given, as for a batch of
    `TreeBatchSampler`. Trees keep their order inside a row and are never interleaved.

    Args:
        trees: trees with tokens.
        max_tokens: budget of a row in tokens; None puts everything into one row.
        on_overflow: what to do with a tree larger than the budget. "split": cut it into several
            trees, each with the history that its samples need, each sample in one of them
            (`.split` counts what is computed twice); "drop": the same, and leave out (and list
            in `.dropped`) samples that are longer than the budget by themselves; "truncate": the
            same, but keep the first `max_tokens` tokens of those, unless nothing is trained there;
            "error": raise.

    Raises:
        MaskError: something else than trees.
        DataError: no trees, a budget below 1, an unknown policy, a tree or sample that does not
            fit and may be neither split nor dropped, or nothing left.
    """
    listed = check_trees(trees, "pack")
    if not listed:
        raise DataError("pack needs at least one tree, got none")
    check_budget(max_tokens, on_overflow)
    if max_tokens is None:
        return PackedRows([PackedRow.from_trees(listed)])
    fitted = FittedTrees(listed, max_tokens, on_overflow=on_overflow)
    rows: dict[int, list[PrefixTree]] = {}  # in the order of their first trees
    for index, row in enumerate(fill_rows(fitted.num_tokens, max_tokens).tolist()):
        rows.setdefault(row, []).append(fitted[index])
    dropped = tuple(key for _, key in fitted.dropped)
    return PackedRows(map(PackedRow.from_trees, rows.values()), dropped, fitted.split)


def stack_rows(
    rows: Sequence[PackedRow], *, pad_token_id: int = 0, pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """The rows as one batch of B rows, padded on the right to a common length L.

    Returns:
        Tensors [B, L]: `input_ids`, `position_ids`, `labels` and `shift_labels` (the same values),
        all int64, `subtree_end` and `sample_counts` int32, and `loss_weights` float32 unless each
        is 0 or 1. A padding token sees itself alone, is in no sample and trains nothing.

    Raises:
        DataError: no rows, or a multiple below 1.
    """
    import torch

    if not rows:
        raise DataError("stack_rows needs at least one row, got none")
    check_multiple(pad_to_multiple_of)
    longest = max(1, *(len(row) for row in rows))
    length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

    def stack(name: str, padding: Any) -> Tensor:
        first = getattr(rows[0], name)
        table = np.empty((len(rows), length), first.dtype)
        table[:] = padding
        for b, row in enumerate(rows):
            table[b, : len(row)] = getattr(row, name)
        return torch.from_numpy(table)

    labels = stack("shift_labels", IGNORE_INDEX)
    batch = {
        "input_ids": stack("input_ids", pad_token_id),
        "position_ids": stack("position_ids", 0),
        "labels": labels,
        "shift_labels": labels.clone(),
        "subtree_end": stack("subtree_end", np.arange(1, length + 1)),
        "sample_counts": stack("sample_counts", 0),
    }
    weights = stack("loss_weights", 0)
    if not torch.equal(weights, (labels != IGNORE_INDEX).double()):
        batch["loss_weights"] = weights.float()
    return batch


def check_multiple(pad_to_multiple_of: int) -> None:
    """Raise DataError unless rows can be padded to a multiple of so many tokens."""
    if pad_to_multiple_of < 1:
        raise DataError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")


def sample_indices(tree: PrefixTree, layout: Layout, offset: int) -> list[np.ndarray]:
    """For each sample of `tree`, the row positions of its tokens, int64."""
    runs = [
        np.arange(start, start + length) + offset
        for start, length in zip(layout.starts.tolist(), tree.lengths.tolist(), strict=True)
    ]
    return [np.concatenate([runs[s] for s in tree.path(leaf.segment)]) for leaf in tree.leaves]
