"""The demo: the same tiny model trained single-pass and N-pass, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from flexmask.data.files import BadLine, find_data_files, read_files
from flexmask.data.renderer import Renderer
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError, FlexmaskError
from flexmask.files import write_json
from flexmask.tools.demo.worker import N_PASS, SINGLE_PASS, ModeResult, WorkerProcess
from flexmask.tools.table import table
from flexmask.tree.build import build_tree
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree

_MASK_BLOCKS = 160  # tiles on a side of the mask's picture, at most
_MODES = (N_PASS, SINGLE_PASS)
_COLUMN = {  # what report.json says of a mode: its name and format in the table
    "tokens": ("tokens", ","),
    "steps": ("steps", ""),
    "seconds": ("seconds", ".1f"),
    "peak_memory_mib": ("peak memory, MiB", ".0f"),
    "first_loss": ("loss, first step", ".6f"),
    "last_loss": ("loss, last step", ".6f"),
}


def train_both_ways(options: argparse.Namespace) -> None:
    """Train both ways from the same weights on the same batches, and report the differences.

    Writes `loss.png`, `mask.png` and `report.json` to a folder, which is made where it does not
    exist, in place of those of an earlier demo, and prints a table.

    Args:
        options: of `flexmask demo`.

    Raises:
        FlexmaskError: the data cannot be used.
    """
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder for --output")
    conversations, vocab_size = _load(options.data)
    batches = _batches(conversations, options.steps, options.batch_size, options.seed)
    results = _train_side_by_side(batches, vocab_size, options.seed)
    differences = _differences(results)
    print(_table(results, differences))
    folder.mkdir(parents=True, exist_ok=True)
    _draw(folder, results, build_tree(max(conversations, key=len)))
    figures = {mode: result.figures for mode, result in results.items()}
    write_json(figures | differences, folder / "report.json")
    print(f"written: {folder}/loss.png, {folder}/mask.png, {folder}/report.json")


def _load(data: Sequence[str]) -> tuple[list[list[Sample]], int]:
    """The samples of every conversation, and the size of the tokenizer's vocabulary."""
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    files = find_data_files(data or [DATA_PATH])
    items = tqdm(read_files(files, Renderer(tokenizer).samples), desc="rendering", unit="")
    return [item for item in items if not isinstance(item, BadLine)], len(tokenizer)


def _batches(
    conversations: list[list[Sample]], num_steps: int, batch_size: int, seed: int
) -> list[list[list[Sample]]]:
    """The conversations of each step: shuffled epochs, end to end."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < num_steps * batch_size:
        order.extend(rng.permutation(len(conversations)).tolist())
    return [
        [conversations[index] for index in order[at : at + batch_size]]
        for at in range(0, num_steps * batch_size, batch_size)
    ]


def _train_side_by_side(
    batches: list[list[list[Sample]]], vocab_size: int, seed: int
) -> dict[str, ModeResult]:
    """What both modes came to; they take turns, so neither disturbs the other."""
    from tqdm import tqdm

    workers: dict[str, Any] = {}
    mode = ""
    with ExitStack() as stack:
        try:
            for mode in _MODES:
                process = stack.enter_context(WorkerProcess(ctx=get_context("spawn")))
                workers[mode] = process.worker(mode, vocab_size, seed)
            for batch in tqdm(batches, desc="training both ways", unit="step"):
                for mode in _MODES:
                    workers[mode].step(batch)
            return {mode: worker.result() for mode, worker in workers.items()}
        except (EOFError, ConnectionError):
            raise FlexmaskError(
                f"the {mode} worker ended before it answered; is there enough memory? "
                "try a smaller --batch_size or shorter conversations"
            ) from None


def _draw(folder: Path, results: dict[str, ModeResult], tree: PrefixTree) -> None:
    """Write `loss.png`, and `mask.png` with the empty, partial and full tiles of a tree's mask."""
    from flexmask.plots import draw_losses, new_figure, save_figure
    from flexmask.tree.mask import compile_mask

    curves = {
        mode: (range(1, len(result.losses) + 1), result.losses) for mode, result in results.items()
    }
    draw_losses(curves, folder / "loss.png")

    length = tree.num_tokens
    block = -(-length // _MASK_BLOCKS)
    (tiles,) = compile_mask(tree).tiles(block, block)
    grid = np.zeros((tiles.num_q_blocks, tiles.num_k_blocks))
    grid[tiles.query, tiles.key] = np.where(tiles.is_full, 1.0, 0.55)
    figure = new_figure(6, 6)
    axes = figure.add_subplot(xlabel="key, packed position", ylabel="query, packed position")
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.3, extent=(0, length, length, 0))
    axes.set_title(
        f"one conversation, {len(tree.leaves)} samples: {length} tokens instead of "
        f"{tree.num_sample_tokens}",
        fontsize=10,
    )
    save_figure(figure, folder / "mask.png")


def _differences(results: dict[str, ModeResult]) -> dict[str, float]:
    """Largest relative differences of single-pass from N-pass."""
    single, npass = results[SINGLE_PASS], results[N_PASS]
    losses = [abs(a - b) / abs(b) for a, b in zip(single.losses, npass.losses, strict=True)]
    gradients = [
        float(np.linalg.norm(single.gradients[name] - theirs) / np.linalg.norm(theirs))
        for name, theirs in npass.gradients.items()
    ]
    return {
        "first_step_loss_difference": losses[0],
        "first_step_gradient_difference": max(gradients),
        "largest_loss_difference": max(losses),
    }


def _table(results: dict[str, ModeResult], differences: dict[str, float]) -> str:
    rows = [("", *_MODES, "ratio")]
    for key, (name, style) in _COLUMN.items():
        npass, single = (results[mode].figures[key] for mode in _MODES)
        ratio = "" if "loss" in name else f"{npass / single:.2f}"
        rows.append((name, f"{npass:{style}}", f"{single:{style}}", ratio))
    return "\n".join(
        [
            table(rows),
            "",
            "largest relative difference of single-pass from N-pass",
            f"  loss, first step          {differences['first_step_loss_difference']:.1e}",
            f"  any gradient, first step  {differences['first_step_gradient_difference']:.1e}",
            f"  loss, all steps           {differences['largest_loss_difference']:.1e}",
        ]
    )
