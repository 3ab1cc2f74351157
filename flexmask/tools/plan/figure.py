"""The distributions of a plan as a picture. Needs matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from flexmask.plots import BLUE, INK, ORANGE, new_figure, save_figure
from flexmask.tools.plan.survey import Plan, distribution

if TYPE_CHECKING:
    from matplotlib.axis import Axis

_NUM_BARS = 32


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a PNG or SVG: samples of a conversation, and tokens of conversations and samples."""
    figure = new_figure(10, 3.4)
    turns, tokens = figure.subplots(1, 2)
    starts, stops, counts = zip(*distribution(plan.turns)["bins"], strict=True)
    widths = np.subtract(stops, starts)
    turns.bar(np.add(starts, (widths - 1) / 2), counts, widths * 0.85, color=BLUE)
    turns.set(xlabel="samples in a conversation", ylabel="conversations")
    turns.locator_params(integer=True, min_n_ticks=1)
    lengths = {
        f"conversations, {plan.conversations:,}": plan.conversation_tokens,
        f"samples, {plan.samples:,}": plan.sample_tokens,
    }
    lowest, highest = min(map(min, lengths.values())), max(map(max, lengths.values()))
    edges = np.geomspace(lowest * 0.98, highest * 1.02, _NUM_BARS + 1).tolist()
    for (name, values), color in zip(lengths.items(), (BLUE, ORANGE), strict=True):
        shares = np.full(len(values), 1 / len(values))
        tokens.hist(values, edges, weights=shares, alpha=0.6, label=name, color=color)
    if plan.overflow is not None:
        tokens.axvline(plan.overflow.max_tokens, color=INK, linestyle="--", label="--max_tokens")
    tokens.set(xscale="log", xlabel="tokens", ylabel="share of each")
    _set_ticks(tokens.xaxis, edges[-1] / edges[0])
    tokens.legend(
        frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0
    )
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


def _set_ticks(axis: Axis, ratio: float) -> None:
    """Ticks of a logarithmic axis that are whole numbers and have room.

    Three or one for each decade, or some at equal distance where it spans too little for these.

    Args:
        axis: the axis.
        ratio: of its largest value to its smallest.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    by_decade = LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,))
    axis.set_major_locator(by_decade if ratio > 4 else MaxNLocator(5, integer=True))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_minor_formatter(NullFormatter())
