"""The distributions of a plan as a picture. Needs matplotlib (`flexmask[train]`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flexmask.plots import new_figure, save_figure
from flexmask.tools.plan.survey import Plan, distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_BARS = 32


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a PNG or SVG: samples of a conversation, and tokens of conversations and samples."""
    figure = new_figure(10, 3.4)
    turns, tokens = figure.subplots(1, 2)
    _draw_turns(turns, plan.turns)
    _draw_lengths(
        tokens,
        {
            f"conversations, {plan.conversations:,}": plan.conversation_tokens,
            f"samples, {plan.samples:,}": plan.sample_tokens,
        },
    )
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
        f"{plan.npass.num_tokens:,} tokens in N-pass, {plan.single_pass.num_tokens:,} in a single "
        f"pass: a ratio of {plan.token_ratio:.2f}",
        fontsize=10,
    )
    save_figure(figure, path)


def _draw_turns(axes: Axes, turns: Sequence[int]) -> None:
    starts, stops, counts = zip(*distribution(turns)["bins"], strict=True)
    widths = np.subtract(stops, starts)
    axes.bar(np.add(starts, (widths - 1) / 2), counts, widths * 0.85)
    axes.set(xlabel="samples in a conversation", ylabel="conversations")
    axes.locator_params(axis="x", integer=True)


def _draw_lengths(axes: Axes, lengths: Mapping[str, Sequence[int]]) -> None:
    lowest, highest = min(map(min, lengths.values())), max(map(max, lengths.values()))
    edges = np.geomspace(lowest * 0.98, highest * 1.02, _NUM_BARS + 1).tolist()
    for name, values in lengths.items():
        shares = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=shares, alpha=0.6, label=name)
