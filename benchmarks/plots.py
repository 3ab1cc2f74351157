"""Plots for docs/benchmarks.md. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexmask.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def draw_curves(curves: Mapping[str, Curve], path: Path, *, x_label: str, y_label: str) -> None:
    """Write a PNG with one line per entry; both axes are logarithmic."""
    figure = new_figure(7, 3.6)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: _binary(value))
    _finish(figure, axes, path)


def draw_bars(
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float]],
    path: Path,
    *,
    x_label: str,
    y_label: str,
) -> None:
    """Write a PNG with one group of bars per entry of `groups`, one bar in each per `bars`."""
    figure = new_figure(7, 3.6)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    width = 0.8 / len(bars)
    for index, (name, heights) in enumerate(bars.items()):
        offset = (index - (len(bars) - 1) / 2) * width
        axes.bar([at + offset for at in range(len(groups))], heights, width * 0.92, label=name)
    axes.set_xticks(range(len(groups)), groups)
    _finish(figure, axes, path)


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    """Write the picture whole or not at all."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _binary(value: float) -> str:
    """A power of two as people say it: 512, 16K, 1M."""
    for unit, suffix in ((2**20, "M"), (2**10, "K")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
