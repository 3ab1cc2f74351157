"""Pictures: files, figures and a loss curve. Needs matplotlib (`flexmask[train]`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flexmask.errors import DataError
from flexmask.files import atomic_write, check_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(path: str | os.PathLike[str], option: str) -> None:
    """Raise DataError, before a long run, unless `save_figure` can write to `path`."""
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise DataError(f"{path}: must end in .png or .svg; {option} names a picture")
    check_target(path, option)
    if find_spec("matplotlib") is None:
        raise DataError(f"{option} needs matplotlib; pip install 'flexmask[train]'")


def draw_losses(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Write a PNG with one loss curve per entry of `curves`: name to (steps, losses)."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss, nats per trained token")
    for index, (name, (steps, losses)) in enumerate(curves.items()):
        # The first curve is drawn wide and pale, so that one that coincides with it stays visible.
        wide = index == 0 and len(curves) > 1
        axes.plot(
            steps, losses, label=name, linewidth=6 if wide else 1.5, alpha=0.35 if wide else 1
        )
    if curves:  # a run may be too short for a loss to be logged
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches that finds room for its labels by itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


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
