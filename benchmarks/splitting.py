"""Conversations larger than the budget: what their pieces compute again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Table, seconds
from benchmarks.timing import Task, alternate, spread
from flexmask import PrefixTree
from flexmask.packing.split import Split, split_tree
from flexmask.packing.split_branches import branches_of
from flexmask.packing.split_groups import contiguous_groups, cost_of

_SPREAD = 0.7  # of the logarithm of lengths
_NUM_TREES = 8
_ROUNDS = 3
_SHAPES = (  # turns, tokens of (context, reasoning, response), budget
    (16, (100, 600, 200), 8_192),
    (32, (50, 500, 150), 16_384),
    (64, (60, 600, 200), 32_768),
    (128, (60, 1000, 200), 65_536),
    (256, (60, 900, 200), 131_072),
)
_QUICK_SHAPES = ((8, (10, 60, 20), 300),)


def measure_cuts(
    measurement: Measurement, trees: Sequence[PrefixTree], *, quick: bool
) -> list[Row]:
    """Cut trees of random lengths, and the given ones; one row each."""
    rows = []
    for num_turns, turn, max_tokens in _QUICK_SHAPES if quick else _SHAPES:
        name = f"{num_turns} turns of {'/'.join(map(str, turn))}"
        drawn = _draw_trees(num_turns, turn, max_tokens)
        rows.append(_measure_shape(measurement, name, drawn, max_tokens))
    rows.append(_measure_shape(measurement, "tutoring", list(trees), 1024))
    if not quick:
        repeated = sum(row["repeated_tokens"] for row in rows)
        fewest = sum(row["fewest_repeated_tokens"] for row in rows)
        name = "tokens computed again beyond the lower bound, as a share"
        measurement.targets.append(Target(name, 0.01, repeated / fewest - 1, is_most=True))
    return rows


def _draw_trees(num_turns: int, turn: tuple[int, int, int], max_tokens: int) -> list[PrefixTree]:
    """Conversations that are larger than the budget though each of their samples fits."""
    generator = np.random.default_rng(num_turns)
    trees: list[PrefixTree] = []
    while len(trees) < _NUM_TREES:
        lengths = np.array(turn) * generator.lognormal(0, _SPREAD, (num_turns, 3)) + 1
        tree = PrefixTree.from_turns([tuple(turn) for turn in lengths.astype(int).tolist()])
        if tree.depth <= max_tokens < tree.num_tokens:
            trees.append(tree)
    return trees


def _measure_shape(
    measurement: Measurement, name: str, trees: Sequence[PrefixTree], max_tokens: int
) -> Row:
    large = [tree for tree in trees if tree.num_tokens > max_tokens]
    splits = [split_tree(tree, max_tokens) for tree in large]
    _check(measurement, name, splits, max_tokens)
    repeated = sum(split.repeated_tokens for split in splits)
    fewest = sum(split.fewest_repeated_tokens for split in splits)
    measurement.check(f"{name}: the lower bound, in tokens", fewest, repeated)
    contiguous = sum(_contiguous(split, max_tokens) for split in splits)
    run = Task(lambda: [split_tree(tree, max_tokens) for tree in large])
    times = alternate({"cut": run}, rounds=_ROUNDS, label=name)["cut"]
    return {
        "kind": "cut",
        "name": name,
        "max_tokens": max_tokens,
        "num_trees": len(large),
        "num_tokens": sum(tree.num_tokens for tree in large),
        "num_pieces": sum(map(len, splits)),
        "num_too_long": sum(len(split.too_long) for split in splits),
        "contiguous_repeated_tokens": contiguous,
        "repeated_tokens": repeated,
        "fewest_repeated_tokens": fewest,
        "num_proven": sum(s.repeated_tokens == s.fewest_repeated_tokens for s in splits),
        "seconds": spread([total / len(large) for total in times]),
    }


def _check(measurement: Measurement, name: str, splits: Sequence[Split], max_tokens: int) -> None:
    """Pieces fit, and hold each sample and each trained token once."""
    pieces = [piece for split in splits for piece in split.pieces()]
    largest = max(piece.num_tokens for piece in pieces)
    measurement.check(f"{name}: tokens of a piece", largest, max_tokens)
    samples = sum(len(split.tree.leaves) - len(split.too_long) for split in splits)
    difference = abs(sum(len(piece.leaves) for piece in pieces) - samples)
    measurement.check(f"{name}: samples in pieces", difference, 0)
    held = 0.0
    for split in splits:
        tree = split.tree
        if tree.loss_weights is None:
            continue
        heads = np.cumsum(tree.lengths) - tree.lengths
        weights = np.add.reduceat(tree.loss_weights, heads)
        held += float(weights[sorted({s for kept in split.segments for s in kept})].sum())
    trained = sum(float(p.loss_weights.sum()) for p in pieces if p.loss_weights is not None)
    measurement.check(f"{name}: trained tokens", abs(trained - held), 0)


def _contiguous(split: Split, max_tokens: int) -> int:
    """Tokens computed again by the best groups that are contiguous in packed order."""
    kept = [leaf for group in split.groups for leaf in group]
    if not kept:
        return 0
    branches = branches_of(split.tree, kept, max_tokens)
    whole = sum(split.num_tokens) - split.repeated_tokens
    return cost_of(branches, contiguous_groups(branches)) - whole


def cut_table(record: Record) -> Table:
    """The cuts of a record."""
    lines = [
        (
            row["name"],
            f"{row['max_tokens']:,}",
            f"{row['num_trees']:,}",
            f"{row['num_tokens'] / row['num_trees']:,.0f}",
            f"{row['num_pieces'] / row['num_trees']:.1f}",
            f"{row['contiguous_repeated_tokens']:,}",
            f"{row['repeated_tokens']:,}",
            f"{row['fewest_repeated_tokens']:,}",
            f"{row['repeated_tokens'] / row['fewest_repeated_tokens'] - 1:.2%}",
            f"{row['num_proven']:,}",
            seconds(row["seconds"]),
        )
        for row in record["rows"]
        if row["kind"] == "cut"
    ]
    columns = (
        *("conversations", "budget", "larger", "tokens each", "pieces each"),
        *("again, contiguous", "again, searched", "at least", "gap", "proven optimal"),
        "time each",
    )
    return Table("Cuts: tokens computed again", columns, lines)
