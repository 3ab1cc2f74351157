"""What changes at 64 ranks and rows of a million tokens, counted and simulated."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3Config

from benchmarks.conversations import long_conversations, scaled_turns
from benchmarks.plots import draw_bars
from benchmarks.record import Measurement, Record, Row
from benchmarks.tables import Table
from flexmask import PrefixTree, compile_mask, render_samples
from flexmask.backends.flex_tables import tables_from_ranges
from flexmask.data.files import read_conversations
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.model.cost import CostModel
from flexmask.model.load import meta_model
from flexmask.model.work import Work, single_pass_work
from flexmask.tools.plan.ranks import Sync, idle_share, pack_by_cost, pack_by_tokens
from flexmask.tools.plan.scaling import RowMemory, devices_needed, longest_row, mask_bytes
from flexmask.tools.plan.sharding import Division, count_pairs, count_remote, divide_row
from flexmask.tree.tree import build_tree

TITLE = "Scaling"
ABOUT = """\
Nothing is timed here: masks and activations are counted, and ranks that wait for each other are
simulated with the cost model of `flexmask plan`. The model is a Qwen3 of 8.2 billion parameters (36
layers of 4,096, 32 heads of 128 with 8 for keys and values, 151,936 tokens) on the meta device; a
device has 80 GB. [scaling.md](scaling.md) says what follows from the figures."""

_RANKS = (8, 64)
_ROWS_PER_STEP = 4
_ROW_TOKENS = (16_384, 65_536, 131_072, 262_144, 1_048_576)
_DEVICE_BYTES, _RESERVE = 80 * 10**9, 8 * 10**9
_SYNCS: tuple[Sync, ...] = ("row", "step")
_DEALT = {  # how rows are filled, and how those of a step are dealt out
    "equal counts": "count, as they come",
    "filled by tokens": "tokens, as they come",
    "filled by tokens, dealt by cost": "tokens, by cost",
    "filled by cost": "cost, as they come",
    "filled and dealt by cost": "cost, by cost",
}
_DIVISIONS: tuple[Division, ...] = ("contiguous", "zigzag", "balanced")


def model_config(num_layers: int = 36) -> Qwen3Config:
    """The shape of an 8B Qwen3."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )


def measure(*, quick: bool) -> Measurement:
    config = model_config(2 if quick else 36)
    cost = CostModel.of(meta_model(config, torch.bfloat16))
    measurement = Measurement(
        settings={
            "parameters": cost.num_parameters,
            "device_bytes": _DEVICE_BYTES,
            "reserve_bytes": _RESERVE,
            "rows_of_a_rank_in_a_step": _ROWS_PER_STEP,
        }
    )
    for num_tokens in (2000,) if quick else (16_384, 131_072, 1_048_576):
        measurement.rows.append(_count_mask(num_tokens, measurement))
    measurement.rows += _simulate(cost, measurement, quick=quick)
    measurement.rows += _count_memory(config, measurement)
    for num_conversations in (1, 2) if quick else (1, 8, 111):
        measurement.rows += _divide(num_conversations, measurement, quick=quick)
    return measurement


def _count_mask(num_tokens: int, measurement: Measurement) -> Row:
    trees = long_conversations(num_tokens)
    mask = compile_mask(trees)
    sizes = mask_bytes(mask.subtree_end[0].numpy())
    if num_tokens <= 131_072:
        tables = tables_from_ranges(mask.subtree_end)
        real = sum(t.untyped_storage().nbytes() for t in tables)
        measurement.check(
            f"bytes of flex tables, {num_tokens:,} tokens, against the backend's",
            abs(real - sizes["flex_tables"]),
            0,
        )
    return {"table": "mask", "num_tokens": num_tokens, "bytes": sizes}


def _simulate(cost: CostModel, measurement: Measurement, *, quick: bool) -> list[Row]:
    if quick:
        kinds = {"synthetic": (_long_work(400_000, 16_384), 16_384)}
    else:
        most = max(_RANKS) * _ROWS_PER_STEP  # rows of one step
        kinds = {
            "shipped": (_shipped_work(4 * most * 16_384), 16_384),
            "long": (_long_work(2 * most * 131_072, 131_072), 131_072),
            "very long": (_long_work(most * 1_048_576, 1_048_576), 1_048_576),
        }
    rows = []
    for kind, (works, capacity) in kinds.items():
        packed = _pack(works, cost, capacity, measurement)
        for num_ranks in (2,) if quick else _RANKS:
            rows.append(
                {
                    "table": "ranks",
                    "conversations": kind,
                    "row_tokens": capacity,
                    "num_ranks": num_ranks,
                    "num_rows": {name: costs.size for name, costs in packed.items()},
                    "most_over_mean": {n: float(c.max() / c.mean()) for n, c in packed.items()},
                    "idle": {
                        f"{name}, {'by cost' if by_cost else 'as they come'}, {sync}": idle_share(
                            costs, num_ranks, _ROWS_PER_STEP, by_cost=by_cost, sync=sync
                        )
                        for name, costs in packed.items()
                        for by_cost in (False, True)
                        for sync in _SYNCS
                    },
                }
            )
    return rows


def _pack(
    works: list[Work], cost: CostModel, capacity: int, measurement: Measurement
) -> dict[str, np.ndarray]:
    """Costs of rows in random order: of equal numbers of conversations, by tokens, by cost."""
    rng = np.random.default_rng(0)
    num_tokens = np.array([work.num_tokens for work in works])
    costs = np.array([cost.flops(work) for work in works])
    found = {}
    for name, rows in {
        "tokens": pack_by_tokens(num_tokens, capacity),
        "cost": pack_by_cost(num_tokens, costs, capacity),
    }.items():
        label = f"{len(works):,} conversations in rows of {capacity:,}, packed by {name}"
        held = sorted(item for row in rows for item in row)
        measurement.check(f"missing from {label}", held != list(range(len(works))), 0)
        fullest = max(int(num_tokens[row].sum()) for row in rows)
        measurement.check(f"fullest of {label}", fullest, capacity)
        found[name] = rng.permutation(np.array([costs[row].sum() for row in rows]))
    size = max(1, len(works) // found["tokens"].size)
    whole = len(works) // size * size
    groups = rng.permutation(costs)[:whole].reshape(-1, size)
    return {"count": groups.sum(1)} | found


def _shipped_work(total: int) -> list[Work]:
    """Tokens and pairs of the demo's conversations, over and over until `total` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    once = [
        single_pass_work(build_tree(render_samples(chat, tokenizer)))
        for chat in read_conversations(DATA_PATH)
    ]
    return once * math.ceil(total / sum(work.num_tokens for work in once))


def _long_work(total: int, longest: int) -> list[Work]:
    """16-turn conversations of log-normal length, 8K to `longest` tokens, `total` together."""
    rng = np.random.default_rng(0)
    works: list[Work] = []
    while total > 0:
        size = int(np.clip(rng.lognormal(np.log(32_768), 1.2), 8192, longest))
        works.append(single_pass_work(PrefixTree.from_turns(scaled_turns(size))))
        total -= size
    return works


def _count_memory(config: Qwen3Config, measurement: Measurement) -> list[Row]:
    memory = RowMemory.of(config)
    ways = memory.ways()
    falling = all(a >= b for a, b in pairwise(ways.values()))
    measurement.check("ways that take more than the one before", not falling, 0)
    rows = []
    for way, per_token in ways.items():
        longest = longest_row(per_token, memory.state, _RANKS[-1], _DEVICE_BYTES, _RESERVE)
        needed = {str(n): devices_needed(n, longest) for n in _ROW_TOKENS}
        rows.append(
            {
                "table": "memory",
                "way": way,
                "bytes_per_token": per_token,
                "longest_row": longest,
                "devices": needed,
            }
        )
    return rows


def _divide(num_conversations: int, measurement: Measurement, *, quick: bool) -> list[Row]:
    length, num_devices, block = (2048, 2, 64) if quick else (1_048_576, 8, 4096)
    sizes = np.diff(np.linspace(0, length, num_conversations + 1).astype(int)).tolist()
    mask = compile_mask([PrefixTree.from_turns(scaled_turns(size)) for size in sizes])
    if mask.position_ids is None:
        raise AssertionError("a compiled mask has positions")
    end, positions = mask.subtree_end[0].numpy(), mask.position_ids[0].numpy().astype(np.int64)
    pairs = count_pairs(positions, block)
    label = f"{num_conversations} conversations in {length:,} tokens"
    measurement.check(f"pairs, {label}", abs(int(pairs.sum()) - mask.num_visible), 0)
    rows = []
    for division in _DIVISIONS:
        shards = divide_row(positions, num_devices, block, division)
        loads = [int(pairs[blocks].sum()) for blocks in shards]
        remote = [count_remote(end, blocks, block) for blocks in shards]
        if division == "contiguous":
            expected = [int(positions[blocks[0] * block]) for blocks in shards]
            wrong = sum(a != b for a, b in zip(remote, expected, strict=True))
            measurement.check(f"shards whose keys are not the ancestors, {label}", wrong, 0)
        rows.append(
            {
                "table": "shards",
                "num_conversations": num_conversations,
                "num_tokens": length,
                "num_devices": num_devices,
                "division": division,
                "most_over_mean": max(loads) * num_devices / sum(loads),
                "most_remote_keys": max(remote),
                "ring_keys": length - length // num_devices,
            }
        )
    return rows


def tables(record: Record) -> list[Table]:
    found: dict[str, list[Row]] = {}
    for row in record["rows"]:
        found.setdefault(row["table"], []).append(row)
    return [
        _mask_table(found["mask"]),
        *(_ranks_table(found["ranks"], sync) for sync in _SYNCS),
        _memory_table(found["memory"]),
        _shards_table(found["shards"]),
    ]


def _mask_table(rows: list[Row]) -> Table:
    names = {
        "subtree_end": "subtree_end",
        "block_mask": "BlockMask",
        "flex_tables": "tables of `flex`",
        "triton_used": "lists of `triton`, in use",
        "triton_lists": "lists of `triton`",
        "dense": "dense, 1 byte a pair",
    }
    lines = [
        (f"{row['num_tokens']:,}", *(_size(row["bytes"][name]) for name in names)) for row in rows
    ]
    return Table("Memory of a row's mask", ("tokens", *names.values()), lines)


def _ranks_table(rows: list[Row], sync: str) -> Table:
    lines = [
        (
            row["conversations"],
            f"{row['row_tokens']:,}",
            str(row["num_ranks"]),
            f"{row['most_over_mean']['tokens']:.2f}",
            f"{row['most_over_mean']['cost']:.2f}",
            *(f"{row['idle'][f'{name}, {sync}']:.1%}" for name in _DEALT.values()),
        )
        for row in rows
    ]
    return Table(
        f"Share of all ranks' time spent waiting, where they meet after every {sync}",
        (
            "conversations",
            "row, tokens",
            "ranks",
            "costliest row / mean, filled by tokens",
            "by cost",
            *_DEALT,
        ),
        lines,
    )


def _memory_table(rows: list[Row]) -> Table:
    lines = [
        (
            row["way"],
            _size(row["bytes_per_token"]),
            f"{row['longest_row']:,}",
            *("-" if n is None else str(n) for n in row["devices"].values()),
        )
        for row in rows
    ]
    lengths = [f"{int(n):,}" for n in rows[0]["devices"]]
    return Table(
        "Devices of 80 GB that one row takes, the state sharded over 64 ranks",
        ("each adds to the one above", "a token", "longest row of one device", *lengths),
        lines,
    )


def _shards_table(rows: list[Row]) -> Table:
    lines = [
        (
            f"{row['num_conversations']:,}",
            row["division"],
            f"{row['most_over_mean']:.2f}",
            f"{row['most_remote_keys']:,}",
            f"{row['ring_keys']:,}",
        )
        for row in rows
    ]
    shape = f"{rows[0]['num_tokens']:,} tokens over {rows[0]['num_devices']} devices"
    return Table(
        f"A row of {shape}",
        (
            "conversations",
            "division",
            "most pairs / mean",
            "most keys to fetch",
            "keys that a ring sends",
        ),
        lines,
    )


def draw(record: Record, path: Path) -> str:
    found = [row for row in record["rows"] if row["table"] == "ranks"]
    rows = [row for row in found if row["num_ranks"] == max(r["num_ranks"] for r in found)]
    draw_bars(
        [f"{row['conversations']}\nrows of {row['row_tokens']:,}" for row in rows],
        {
            label: [100 * row["idle"][f"{name}, row"] for row in rows]
            for label, name in _DEALT.items()
        },
        path,
        x_label=f"conversations, {rows[0]['num_ranks']} ranks that meet after every row",
        y_label="% of time waiting",
    )
    return (
        "Share of all ranks' time spent waiting for the slowest, by how rows are made and dealt out"
    )


def _size(num_bytes: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes / 2**10:,.0f} KiB"
