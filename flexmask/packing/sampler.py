"""TreeBatchSampler: batches of rows filled under a token budget, of equal predicted cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flexmask.errors import DataError, FlexmaskError
from flexmask.packing.epoch import EpochPlan
from flexmask.packing.fill import (
    best_fit,
    fewest_rows,
    fill_rows,
    from_large,
    shuffled_by_octave,
    spread_evenly,
    spread_out,
    use_all_rows,
)
from flexmask.packing.fitting import sizes_of

PAIRS_PER_TOKEN = 24_576
"""Visible pairs that cost as much as the linear layers do for one token, where no model is known.

In a dense model of width d, a layer has 12 d^2 parameters: 72 d^2 operations a token, and 12 d a
visible pair. Their quotient is 6 d, here with d = 4096.
"""

_MIXED_ROWS = 1.01  # times as many rows as the fewest found, at most, to mix them in every epoch
_HEADROOM = 1.0005  # times as many rows as one epoch takes, so that others fit too


class TreeBatchSampler:
    """Batches of tree indices, each `rows_per_batch` rows of at most `max_tokens` tokens.

    A PyTorch `batch_sampler`: `DataLoader(dataset, batch_sampler=sampler, collate_fn=collator)`
    with `TreeCollator(max_tokens=...)`, which packs a batch into no more rows than planned here.

    Over all processes, every tree is in exactly one batch of an epoch: nothing is dropped, nothing
    repeated. The batches follow from seed, epoch and sizes alone, so that a resumed epoch goes on
    where it stopped; no process needs to ask another.

    Rows are as few as `fill_rows` finds, or up to 1% more where that lets every epoch mix them
    anew, rounded up to a multiple of `num_processes`. Those of one step have about the same cost,

        tokens + visible pairs / pairs_per_token,

    or the one that `costs` gives: layers with a window see fewer pairs.

    Where a step has fewer trees than processes, some get an empty batch, which the collator turns
    into padding that trains nothing; `plan().num_empty` counts them.

    Attributes:
        epoch: which epoch the next iteration is; see `set_epoch`.
        num_rows: rows of every epoch, over all processes.
        fewest_rows: a number of rows that no packing is below.
        batch_size: None, as batches differ in trees; accelerate looks at it.
    """

    batch_size = None
    drop_last = False

    def __init__(
        self,
        trees: Any,
        *,
        max_tokens: int,
        rows_per_batch: int = 1,
        num_processes: int = 1,
        process_index: int | None = None,
        pairs_per_token: float = PAIRS_PER_TOKEN,
        costs: Any = None,
        seed: int = 0,
    ) -> None:
        """Plan the rows of all epochs.

        Args:
            trees: what has `num_tokens` and `num_pairs` as int64 [n], or PrefixTrees; tokens are
                not looked at.
            max_tokens: budget of a row; every tree must fit (see `FittedTrees`).
            rows_per_batch: rows of one batch; the last batches of an epoch may have fewer.
            num_processes: data-parallel processes.
            process_index: yield the batches of this process only. None: those of all of them, step
                by step, for accelerate to hand out.
            pairs_per_token: visible pairs that cost as much as one token;
                `CostModel.of(model).pairs_per_token` knows it for a model.
            costs: predicted cost of each tree, above 0, in any unit, [n]; in place of what
                `pairs_per_token` gives. `CostModel.of(model).tree_cost` knows them.
            seed: with the epoch, what rows and order are drawn from.

        Raises:
            DataError: no trees, a tree larger than the budget, or a number out of range.
        """
        self._sizes, pairs = sizes_of(trees)
        if costs is None:
            costs = self._sizes + pairs / pairs_per_token
        self._costs = np.asarray(costs, np.float64)
        self.max_tokens = max_tokens
        self.rows_per_batch = rows_per_batch
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # accelerate hands set_epoch to `batch_sampler.sampler`
        self._check()
        self.fewest_rows = fewest_rows(self._sizes, max_tokens)
        self._rows = fill_rows(self._sizes, max_tokens)
        num_rows = self._count_rows()
        self.num_rows = -(-num_rows // num_processes) * num_processes
        self._plan: tuple[int, EpochPlan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; call it before each, as for other samplers."""
        self.epoch = epoch

    def __len__(self) -> int:
        num_steps = -(-self.num_rows // (self.num_processes * self.rows_per_batch))
        return num_steps * (self.num_processes if self.process_index is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.plan(self.epoch).batches
        if self.process_index is not None:
            batches = batches[self.process_index :: self.num_processes]
        yield from (list(batch) for batch in batches)

    def plan(self, epoch: int = 0) -> EpochPlan:
        """The batches of an epoch, and how full and how equal they are."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_plan(np.random.default_rng([self.seed, epoch])))
        return self._plan[1]

    def prepare(self, loader: Any, accelerator: Any) -> Any:
        """`accelerator.prepare(loader)` for a loader of these batches, checked.

        Each process gets its own batches, and `loader.set_epoch` reaches this sampler also through
        `accelerate.skip_first_batches`.

        Args:
            loader: a DataLoader whose `batch_sampler` is this one, made for all processes.
            accelerator: the Accelerator.

        Raises:
            FlexmaskError: accelerate would hand the batches out in another way than planned.
        """
        if accelerator.split_batches or accelerator.dispatch_batches:
            raise FlexmaskError(
                "accelerate: split_batches and dispatch_batches must be off, since rows differ in "
                f"length; got {accelerator.split_batches} and {accelerator.dispatch_batches}"
            )
        if self.process_index is not None:
            raise FlexmaskError(
                "with accelerate, which hands the batches out, process_index must be None, got "
                f"{self.process_index}"
            )
        prepared = accelerator.prepare(loader)
        shard = prepared.batch_sampler
        num_processes = 1 if shard is self else shard.num_processes
        if num_processes != self.num_processes:
            raise FlexmaskError(
                f"num_processes must be {num_processes}, as many as are data-parallel, got "
                f"{self.num_processes}"
            )
        prepared.set_sampler(self)
        return prepared

    def _check(self) -> None:
        if not self._sizes.size:
            raise DataError("TreeBatchSampler needs at least one tree, got none")
        for name in ("max_tokens", "rows_per_batch", "num_processes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.process_index is not None and not 0 <= self.process_index < self.num_processes:
            raise DataError(
                f"process_index must be in [0, {self.num_processes}), got {self.process_index}"
            )
        if self._costs.shape != self._sizes.shape or not (self._costs > 0).all():
            raise DataError(
                f"costs must be [{self._sizes.size}], one above 0 for each tree, got "
                f"{list(self._costs.shape)}"
            )
        largest = int(self._sizes.argmax())
        if self._sizes[largest] > self.max_tokens:
            raise DataError(
                f"tree {largest}: must have at most max_tokens = {self.max_tokens} tokens, got "
                f"{self._sizes[largest]}; raise max_tokens or cut it with "
                f"FittedTrees(trees, {self.max_tokens})"
            )

    def _count_rows(self) -> int:
        """As many as the rows found, or as mixed ones take, if that is little more."""
        fewest = int(self._rows.max()) + 1
        order = shuffled_by_octave(self._sizes, np.random.default_rng([self.seed, 0]))
        mixed = int(best_fit(self._sizes, self.max_tokens, order).max()) + 1
        return max(fewest, int(mixed * _HEADROOM)) if mixed <= fewest * _MIXED_ROWS else fewest

    def _epoch_rows(self, generator: np.random.Generator) -> np.ndarray:
        """Rows of one epoch, mixed anew: of equal cost where there is room for that."""
        order = shuffled_by_octave(self._sizes, generator)
        rows = spread_out(self._sizes, self._costs, self.max_tokens, self.num_rows, order)
        if rows is not None:
            return rows
        rows = best_fit(self._sizes, self.max_tokens, order)
        if rows.max() >= self.num_rows:
            rows = self._rows
        return use_all_rows(rows, self._sizes, self.num_rows)

    def _make_plan(self, generator: np.random.Generator) -> EpochPlan:
        """The rows of one epoch as steps.

        All processes of a step wait for the slowest. So rows are sorted by predicted cost,
        neighbours go into the same step, and what is in one is spread over its rows once more.
        Steps then come in random order.
        """
        sizes, costs, num_processes = self._sizes, self._costs, self.num_processes
        rows = self._epoch_rows(generator)
        ends = np.cumsum(np.bincount(rows, minlength=self.num_rows))[:-1]
        held = np.split(np.argsort(rows, kind="stable"), ends)
        by_cost = from_large(np.bincount(rows, costs, self.num_rows)).reshape(-1, num_processes)
        chunks = generator.permutation(by_cost)
        num_steps = -(-len(chunks) // self.rows_per_batch)
        batches: list[list[int]] = [[] for _ in range(num_steps * num_processes)]
        totals = np.zeros((3, num_steps, num_processes))
        run_costs = np.zeros(num_processes)
        for number, chunk in enumerate(chunks):
            step = number // self.rows_per_batch
            taken = spread_evenly([held[row] for row in chunk], sizes, costs, self.max_tokens)
            row_costs = np.array([costs[trees].sum() for trees in taken])
            heaviest = from_large(row_costs)
            lightest = np.lexsort((run_costs, totals[2, step]))
            for row, process in zip(heaviest.tolist(), lightest.tolist(), strict=True):
                trees = taken[row]
                batches[step * num_processes + process].extend(trees.tolist())
                totals[:, step, process] += (trees.size > 0, sizes[trees].sum(), row_costs[row])
                run_costs[process] += row_costs[row]
        num_rows, tokens = totals[:2].astype(np.int64)
        return EpochPlan(batches, num_rows, tokens, totals[2], self.max_tokens, self.fewest_rows)
