"""The demo: the same tiny model trained single-pass and N-pass, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from flexmask.data.files import BadLine, read_files
from flexmask.data.messages import Conversation
from flexmask.data.renderer import Renderer
from flexmask.data.sources import find_data_files
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError, FlexmaskError, need_packages
from flexmask.files import write_json
from flexmask.plots import draw_losses
from flexmask.tools.demo.worker import N_PASS, SINGLE_PASS, ModeResult, WorkerProcess
from flexmask.tools.show.kinds import label_tree
from flexmask.tools.show.row_figures import draw_rows, row_heading
from flexmask.tools.show.run import row_pictures
from flexmask.tools.table import table
from flexmask.tree.sample import Sample

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
    need_packages("flexmask demo", "matplotlib")
    renderer, loaded = _load(options.data)
    conversations = [samples for _, samples in loaded]
    vocab_size = len(renderer.tokenizer)
    batches = _batches(conversations, options.steps, options.batch_size, options.seed)
    results = _train_side_by_side(batches, vocab_size, options.seed)
    differences = _differences(results)
    print(_table(results, differences))
    folder.mkdir(parents=True, exist_ok=True)
    longest, _ = max(loaded, key=lambda pair: len(pair[1]))
    _draw(folder, results, longest, renderer)
    figures = {mode: result.figures for mode, result in results.items()}
    write_json(figures | differences, folder / "report.json")
    print(f"written: {folder}/loss.png, {folder}/mask.png, {folder}/report.json")


def _load(data: Sequence[str]) -> tuple[Renderer, list[tuple[Conversation, list[Sample]]]]:
    """What renders, and every conversation with its samples."""
    from tqdm import tqdm
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(TOKENIZER_PATH))
    read = read_files(
        find_data_files(data or [DATA_PATH]), lambda own: (own, renderer.samples(own))
    )
    items = tqdm(read, desc="rendering", unit="")
    return renderer, [item for item in items if not isinstance(item, BadLine)]


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


def _draw(
    folder: Path, results: dict[str, ModeResult], conversation: Conversation, renderer: Renderer
) -> None:
    """Write `loss.png`, and `mask.png` with a conversation as `flexmask show` draws it."""
    curves = {
        mode: (range(1, len(result.losses) + 1), result.losses) for mode, result in results.items()
    }
    draw_losses(curves, folder / "loss.png")
    tree = label_tree(renderer.tree(conversation), conversation, renderer)
    heading = row_heading(Path(conversation.where or "").name, tree, tree.num_tokens)
    draw_rows(row_pictures([tree]), folder / "mask.png", heading=heading)


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
