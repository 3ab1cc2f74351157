"""Orders of the packed row against each other: how much of the visited tiles is visible."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.conversations import long_conversations
from benchmarks.kernel_cost import USUAL, varlen_cost
from benchmarks.plots import draw_bars
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Table, gather_table
from flexmask import PrefixTree, compile_mask
from flexmask.tools.show.orders import papers_order, tile_counts, token_index
from flexmask.tree.layout import lay_out, packed_index
from flexmask.tree.oracle import ancestry

TITLE = "Order of the packed row"
ABOUT = """\
Visible pairs divided by the area of the 128 x 128 tiles that hold any: 1 wastes no work. The
paper's order is that of arXiv 2504.18246 and its code: turn by turn the context, the reasoning, the
response's copy for the history and the trained response. Both preorders walk the tree depth-first;
light first visits the smallest subtree first, heavy first (what flexmask does) the largest. Nothing
is timed: the counts are exact and the same on every machine.

`varlen` gathers the keys of each chain, at most the tokens of N-pass. Counted with 32 query and 8
key heads of 128 in 16 bits; where fewer than 150 visible pairs come to a gathered key, "auto" takes
`flex` on a GPU."""

_BLOCK = 128
_SHAPES = (  # number of turns, tokens of (context, reasoning, response), and what it must reach
    (8, (60, 300, 120), 0.815),
    (16, (60, 300, 120), 0.876),
    (16, (30, 300, 40), 0.762),
    (32, (50, 500, 150), 0.938),
    (16, (200, 1500, 300), 0.954),
)
_QUICK_SHAPES = ((3, (30, 100, 40), 0.0), (8, (11, 40, 9), 0.0))


def measure(*, quick: bool) -> Measurement:
    measurement = Measurement(settings={"block": _BLOCK})
    for num_turns, turn, goal in _QUICK_SHAPES if quick else _SHAPES:
        tree = PrefixTree.from_turns([turn] * num_turns)
        orders = segment_orders(tree)
        mask = compile_mask(tree)
        visited = {name: _num_visited(tree, order) for name, order in orders.items()}
        difference = abs(visited["heavy first"] - mask.tiles(_BLOCK, _BLOCK)[0].num_visited)
        name = f"{num_turns} turns of {'/'.join(map(str, turn))}"
        measurement.check(f"visited tiles, {name}, against the mask's own", difference, 0)
        difference = abs(tree.num_pairs - mask.num_visible)
        measurement.check(f"visible pairs, {name}, against the mask's own", difference, 0)
        densities = {key: tree.num_pairs / (count * _BLOCK**2) for key, count in visited.items()}
        measurement.rows.append(
            {
                "num_turns": num_turns,
                "turn": turn,
                "num_tokens": tree.num_tokens,
                "num_visible": tree.num_pairs,
                "num_visited_tiles": visited,
                "density": densities,
            }
        )
        if not quick:
            measured = round(densities["heavy first"], 3)  # the goals have three digits
            measurement.targets.append(Target(f"heavy first, {name}", goal, measured))
    _check_against_ancestry(measurement)
    measurement.details["varlen"] = [_gather(measurement, *row) for row in _packed(quick=quick)]
    return measurement


def _packed(*, quick: bool) -> list[tuple[str, list[PrefixTree]]]:
    """Rows whose gathered keys are counted."""
    if quick:
        return [("3 x 30/100/40", [PrefixTree.from_turns([(30, 100, 40)] * 3)])]
    rows = [(f"16 x 60/300/120 to {n}K", long_conversations(n * 1024)) for n in (32, 128)]
    rollouts = PrefixTree.from_turns([(8000, 100, 0), *[(0, 100, 0)] * 63])
    return [*rows, ("64 rollouts of 100 on a prompt of 8,000", [rollouts])]


def _gather(measurement: Measurement, name: str, trees: list[PrefixTree]) -> Row:
    cost = varlen_cost(compile_mask(trees), USUAL)
    num_npass = sum(tree.num_sample_tokens for tree in trees)
    more = max(0, cost["keys"] - num_npass)
    measurement.check(f"keys that varlen gathers, {name}, more than N-pass tokens", more, 0)
    return {"name": name, "num_npass_tokens": num_npass, **cost}


def segment_orders(tree: PrefixTree) -> dict[str, list[int]]:
    """The segments of `tree`, made by `from_turns`, in each of the compared orders."""
    return {
        "paper's order": papers_order(tree),
        "light first": _light_first(tree),
        "heavy first": lay_out(tree).order.tolist(),
    }


def _num_visited(tree: PrefixTree, order: list[int]) -> int:
    """How many tiles hold a visible pair when the segments are laid out in `order`."""
    return int(np.count_nonzero(tile_counts(tree, order, _BLOCK)))


def _light_first(tree: PrefixTree) -> list[int]:
    sizes = tree.lengths.tolist()
    children: list[list[int]] = [[] for _ in sizes]
    for index in range(len(sizes) - 1, 0, -1):
        parent = tree.segments[index].parent
        if parent is not None:
            sizes[parent] += sizes[index]
            children[parent].insert(0, index)
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack.extend(sorted(children[order[-1]], key=sizes.__getitem__, reverse=True))
    return order


def _check_against_ancestry(measurement: Measurement) -> None:
    """Count the tiles of one conversation in its dense mask, up the parent links."""
    tree = PrefixTree.from_turns([(30, 90, 40)] * 6)
    dense = ancestry(tree)[np.ix_(*[packed_index(tree)] * 2)]  # in tree order
    for name, order in segment_orders(tree).items():
        row = dense[np.ix_(*[token_index(tree, order)] * 2)]
        edges = np.arange(0, tree.num_tokens, _BLOCK)
        tiles = np.logical_or.reduceat(np.logical_or.reduceat(row, edges, 0), edges, 1)
        difference = abs(_num_visited(tree, order) - int(tiles.sum()))
        measurement.check(f"visited tiles, {name}, against the dense mask", difference, 0)


def tables(record: Record) -> list[Table]:
    orders = list(record["rows"][0]["density"])
    lines = [
        (
            f"{row['num_turns']} turns of {'/'.join(map(str, row['turn']))}",
            f"{row['num_tokens']:,}",
            f"{row['num_visible']:,}",
            *(f"{row['density'][order]:.3f}" for order in orders),
        )
        for row in record["rows"]
    ]
    columns = ("conversation", "tokens", "visible pairs", *orders)
    return [
        Table("Visible pairs / area of visited 128 x 128 tiles", columns, lines),
        gather_table(record["details"]["varlen"]),
    ]


def draw(record: Record, path: Path) -> str:
    rows = record["rows"]
    draw_bars(
        [f"{row['num_turns']} x\n{'/'.join(map(str, row['turn']))}" for row in rows],
        {order: [row["density"][order] for row in rows] for order in rows[0]["density"]},
        path,
        x_label="turns x context/reasoning/response tokens",
        y_label="visible / visited",
    )
    return "Visible pairs per pair in a visited tile, by order of the row"
