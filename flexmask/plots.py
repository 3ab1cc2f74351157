"""Pictures: files, figures and a loss curve. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexmask.errors import DataError, need_packages
from flexmask.files import atomic_write, check_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, INK = "#2f74c0", "#e69b2e", "#2f9e77", "#93a1b0", "#1d2733"
_MARKED = 12  # points of a curve that has a dot for each, at most


def check_picture(path: str | os.PathLike[str], option: str) -> None:
    """Raise DataError, before a long run, unless `save_figure` can write to `path`."""
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise DataError(f"{path}: must end in .png or .svg; {option} names a picture")
    check_target(path, option)
    need_packages(option, "matplotlib")


def draw_losses(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Write a PNG with the one or two loss curves of `curves`: name to (steps, losses)."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss, nats per trained token")
    # The second curve is dashed, so that the first stays visible where they coincide.
    styles = ((BLUE, "-", 2.0), (ORANGE, "--", 1.6))[: len(curves)]
    for (name, (steps, losses)), style in zip(curves.items(), styles, strict=True):
        color, dashes, width = style
        axes.plot(
            steps,
            losses,
            dashes,
            label=name,
            color=color,
            linewidth=width,
            marker="o" if len(steps) <= _MARKED else None,
            markersize=3,
        )
    if curves:  # a run may be too short for a loss to be logged
        axes.legend(frameon=False)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches that finds room for its labels by itself."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as SVG or PNG, by the ending of `path`; the whole file or none.

    The same figure gives the same bytes.
    """
    from matplotlib import rc_context

    is_svg = os.fspath(path).lower().endswith(".svg")
    with atomic_write(path) as partial, rc_context({"svg.hashsalt": "flexmask"}):
        figure.savefig(
            partial,
            format="svg" if is_svg else "png",
            dpi=150,
            metadata={"Date": None} if is_svg else None,
        )
