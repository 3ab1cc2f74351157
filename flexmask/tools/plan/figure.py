"""The distributions of a plan as a picture. Needs matplotlib (`flexmask[train]`)."""

from __future__ import annotations

import os

import numpy as np

from flexmask.plots import new_figure, save_figure
from flexmask.tools.plan.survey import Plan, distribution

_NUM_BARS = 32


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a PNG or SVG: samples of a conversation, and tokens of conversations and samples."""
    figure = new_figure(10, 3.4)
    turns, tokens = figure.subplots(1, 2)
    starts, stops, counts = zip(*distribution(plan.turns)["bins"], strict=True)
    widths = np.subtract(stops, starts)
    turns.bar(np.add(starts, (widths - 1) / 2), counts, widths * 0.85)
    turns.set(xlabel="samples in a conversation", ylabel="conversations")
    turns.locator_params(axis="x", integer=True)
    lengths = {
        f"conversations, {plan.conversations:,}": plan.conversation_tokens,
        f"samples, {plan.samples:,}": plan.sample_tokens,
    }
    lowest, highest = min(map(min, lengths.values())), max(map(max, lengths.values()))
    edges = np.geomspace(lowest * 0.98, highest * 1.02, _NUM_BARS + 1).tolist()
    for name, values in lengths.items():
        shares = np.full(len(values), 1 / len(values))
        tokens.hist(values, edges, weights=shares, alpha=0.6, label=name)
    if plan.overflow is not None:
        tokens.axvline(plan.overflow.max_tokens, color="0.3", linestyle="--", label="--max_tokens")
    tokens.set(xscale="log", xlabel="tokens", ylabel="share of each")
    tokens.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    tokens.legend(frameon=False, fontsize=9)
    for axes in (turns, tokens):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle(
        f"tokens: {plan.npass.work.num_tokens:,} in N-pass, {plan.one_render.work.num_tokens:,} in "
        f"one render, {plan.single_pass.work.num_tokens:,} in a single pass",
        fontsize=10,
    )
    save_figure(figure, path)
