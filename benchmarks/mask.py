"""Building the BlockMask: from tile ranges, against `create_block_mask`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.conversations import NUM_TURNS, TURN, long_conversations
from benchmarks.peak import measure_peak
from benchmarks.plots import Curve, draw_curves
from benchmarks.record import Measurement, Record, Row, Target
from benchmarks.tables import Columns, Table, seconds, size, table, times
from benchmarks.timing import Task, compare
from flexmask import PrefixTree, TreeMask, compile_mask

TITLE = "Building the mask"
ABOUT = """\
16-turn conversations (60 context, 300 reasoning and 120 response tokens a turn, scaled a little so
that they fill a row exactly) are compiled to a mask (`compile_mask`), and the mask to
FlexAttention's BlockMask (`to_block_mask`). `create_block_mask` builds the same from the same
`mask_mod`, eagerly on the CPU, wherever it is measured; the two agree block for block. Trees are
new for each call. Peaks are what a fresh process holds beyond its inputs, rounded up to pages."""

_BLOCK = 128
_COMPARED_TOKENS = (1024, 2048, 4096, 8192, 16384)
_OWN_TOKENS = (32_768, 131_072, 524_288, 1_048_576)


def measure(*, quick: bool) -> Measurement:
    compared = (500,) if quick else _COMPARED_TOKENS
    own = () if quick else _OWN_TOKENS
    measurement = Measurement(
        settings={"turns": NUM_TURNS, "turn": TURN, "block": _BLOCK, "rounds": 2 if quick else 5}
    )
    for num_tokens in (*compared, *own):
        row = _measure(num_tokens, num_tokens in compared, measurement)
        measurement.rows.append(row)
    if not quick:
        measurement.targets = _targets(measurement.rows)
    return measurement


def _measure(num_tokens: int, is_compared: bool, measurement: Measurement) -> Row:
    mask = compile_mask(long_conversations(num_tokens))
    tasks = {
        "compile": Task(compile_mask, lambda: (long_conversations(num_tokens),)),
        "block_mask": Task(mask.to_block_mask),
        "both": Task(
            lambda trees: compile_mask(trees).to_block_mask(),
            lambda: (long_conversations(num_tokens),),
        ),
    }
    ours = mask.to_block_mask()
    missing = abs(mask.num_visible - sum(tree.num_pairs for tree in long_conversations(num_tokens)))
    measurement.check(f"visible pairs, {num_tokens:,} tokens, against the trees", missing, 0)
    if is_compared:
        different = count_differences(ours, _create(mask))
        measurement.check(f"blocks that differ, {num_tokens:,} tokens", different, 0)
        tasks["create_block_mask"] = Task(lambda: _create(mask))
    rounds = measurement.settings["rounds"]
    found = compare(tasks, "block_mask", rounds=rounds, label=f"{num_tokens:,} tokens")
    row: Row = {
        "num_tokens": num_tokens,
        "num_visited_tiles": mask.tiles(_BLOCK, _BLOCK)[0].num_visited,
        "index_bytes": _index_bytes(ours),
        "elapsed_s": found["elapsed_s"],
        "peak_bytes": {},
    }
    builders = ["to_block_mask"]
    if is_compared:
        builders.append("create_block_mask")
        row["speed_up"] = found["speed_up"]["create_block_mask"]
    for builder in builders:
        row["peak_bytes"][builder] = measure_peak(prepare, builder, num_tokens).num_bytes
    return row


def count_differences(a: BlockMask, b: BlockMask) -> int:
    """How many entries of the index tensors of `a` and `b` differ, unused entries left out."""
    differences = 0
    for counts, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        differences += int((getattr(a, counts) != getattr(b, counts)).sum())
        differences += int((_used(a, counts, indices) != _used(b, counts, indices)).sum())
    return differences


def _used(block_mask: BlockMask, counts: str, indices: str) -> Tensor:
    """Index table with the entries beyond each row's count set to -1."""
    number, table = getattr(block_mask, counts), getattr(block_mask, indices)
    return torch.where(torch.arange(table.shape[-1]) < number.unsqueeze(-1), table, -1)


def _index_bytes(block_mask: BlockMask) -> int:
    """Memory behind all index tensors."""
    tensors = [x for x in block_mask.as_tuple(flatten=True) if isinstance(x, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _create(mask: TreeMask) -> BlockMask:
    B, L = mask.shape
    return create_block_mask(mask.mask_mod, B, None, L, L, device="cpu", BLOCK_SIZE=_BLOCK)


def prepare(builder: str, num_tokens: int) -> Callable[[], None]:
    """Trees to BlockMask by `to_block_mask` or `create_block_mask`; for `measure_peak`."""
    build = _create if builder == "create_block_mask" else TreeMask.to_block_mask
    build(compile_mask(PrefixTree.from_turns([TURN])))
    trees = long_conversations(num_tokens)

    def run() -> None:
        build(compile_mask(trees))

    return run


def _targets(rows: list[Row]) -> list[Target]:
    by_tokens = {row["num_tokens"]: row for row in rows}
    longest = by_tokens[131_072]["elapsed_s"]["both"]["median"]
    return [
        Target(
            "BlockMask of 16,384 tokens, times faster than create_block_mask",
            1000,
            by_tokens[16_384]["speed_up"]["median"],
        ),
        Target("layout, mask and BlockMask of 131,072 tokens, ms", 5, longest * 1e3, is_most=True),
    ]


def tables(record: Record) -> list[Table]:
    elapsed: Columns = {
        "tokens": lambda row: f"{row['num_tokens']:,}",
        "create_block_mask": lambda row: seconds(row["elapsed_s"].get("create_block_mask")),
        "to_block_mask": lambda row: seconds(row["elapsed_s"]["block_mask"]),
        "times faster": lambda row: times(row.get("speed_up")),
        "compile_mask": lambda row: seconds(row["elapsed_s"]["compile"]),
        "both of ours": lambda row: seconds(row["elapsed_s"]["both"]),
    }
    memory: Columns = {
        "tokens": lambda row: f"{row['num_tokens']:,}",
        "visited tiles": lambda row: f"{row['num_visited_tiles']:,}",
        "index tensors": lambda row: size(row["index_bytes"]),
        "peak, compile_mask and to_block_mask": lambda row: size(
            row["peak_bytes"]["to_block_mask"]
        ),
        "peak, create_block_mask": lambda row: size(row["peak_bytes"].get("create_block_mask")),
    }
    return [
        table("Time: median (lowest-highest)", record["rows"], elapsed),
        table("Memory", record["rows"], memory),
    ]


def draw(record: Record, path: Path) -> str:
    def points(name: str) -> Curve:
        rows = [row for row in record["rows"] if name in row["elapsed_s"]]
        return (
            [row["num_tokens"] for row in rows],
            [row["elapsed_s"][name]["median"] * 1e3 for row in rows],
        )

    draw_curves(
        {
            "create_block_mask": points("create_block_mask"),
            "compile_mask and to_block_mask": points("both"),
        },
        path,
        x_label="tokens in the row",
        y_label="milliseconds",
    )
    return "Time to build a BlockMask against the length of the row, both axes logarithmic"
