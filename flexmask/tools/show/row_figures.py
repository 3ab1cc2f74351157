"""Pictures of packed rows: tiles of the mask, and what the tokens are, along both edges.

Needs matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmask.errors import pluralize
from flexmask.plots import BLUE, GREEN, GREY, INK, ORANGE, new_figure, save_figure
from flexmask.tools.show.kinds import KINDS
from flexmask.tools.show.orders import density, packed_starts, tile_counts, token_index
from flexmask.tree.tree import PrefixTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"context": GREY, "thinking": ORANGE, "response": BLUE, "tool": GREEN}
_SAME = {"reasoning": "thinking", "history": "response"}  # kinds of `PrefixTree.from_turns`
_FULL, _PARTIAL = 0.9, 0.45  # how much of a tile's colour is its own, and not white
_LEAST_TILE, _MOST_TILES = 4, 96  # tokens of a tile, and tiles on a side
_MOST_LABELS = 45  # on the right
_BAND, _GAP = 0.022, 0.008  # of the picture's side: width of a band, and space between two


@dataclass(frozen=True, eq=False)
class RowPicture:
    """One panel: a tree, laid out in some order.

    Attributes:
        tree: segments with kinds; trained tokens are marked where it has tokens.
        order: all its segments, in the order of the row.
        name: what stands above, before the density.
    """

    tree: PrefixTree
    order: Sequence[int]
    name: str

    @cached_property
    def density(self) -> float:
        """Visible pairs per pair in a visited tile of 128 x 128."""
        return density(self.tree, self.order)

    @property
    def title(self) -> str:
        """What stands above."""
        return f"{self.name} density {self.density:.3f}"

    @cached_property
    def segment_kinds(self) -> np.ndarray:
        """Index into KINDS of each segment, in the order of the tree."""
        named = [segment.kind or "context" for segment in self.tree.segments]
        return np.array([KINDS.index(_SAME.get(kind, kind)) for kind in named])

    @cached_property
    def kinds(self) -> np.ndarray:
        """Index into KINDS of each packed token, int64 [L]."""
        return np.repeat(self.segment_kinds[self.order], self.tree.lengths[self.order])

    @cached_property
    def trained(self) -> np.ndarray:
        """Whether each packed token is a target, bool [L]."""
        weights = self.tree.loss_weights
        if weights is None:
            return np.zeros(self.tree.num_tokens, bool)
        return weights[token_index(self.tree, self.order)] > 0


def row_heading(name: str, tree: PrefixTree, num_tokens: int) -> str:
    """What stands above the rows of a conversation, which have `num_tokens` together."""
    instead = f" instead of {tree.num_sample_tokens:,}"
    return (
        f"{name}: {pluralize(len(tree.leaves), 'sample')}, {pluralize(num_tokens, 'token')}"
        f"{instead if num_tokens != tree.num_sample_tokens else ''}"
    )


def draw_rows(
    pictures: Sequence[RowPicture], path: str | os.PathLike[str], *, heading: str = ""
) -> None:
    """Write packed rows side by side, as PNG or SVG by the ending of `path`.

    A tile has the colour of the keys that it lets see, of most of them where they are of several
    kinds: strong where all its pairs are visible, pale where some are.
    """
    num_columns = min(3, len(pictures))
    num_lines = -(-len(pictures) // num_columns)
    figure = new_figure(7.2 * num_columns, 6.3 * num_lines + (0.7 if heading else 0.4))
    block = _tile_size(max(picture.tree.num_tokens for picture in pictures))
    for index, picture in enumerate(pictures):
        _draw_row(figure.add_subplot(num_lines, num_columns, index + 1), picture, block)
    if heading:
        figure.suptitle(heading, fontsize=13, fontweight="bold", color=INK, parse_math=False)
    _add_legend(figure, pictures, block)
    save_figure(figure, path)


def _tile_size(num_tokens: int) -> int:
    """The smallest power of two from `_LEAST_TILE` on that makes at most `_MOST_TILES` tiles."""
    block = _LEAST_TILE
    while num_tokens > block * _MOST_TILES:
        block *= 2
    return block


def _draw_row(axes: Axes, picture: RowPicture, block: int) -> None:
    length = picture.tree.num_tokens
    tiles = _tile_colors(picture, block)
    side = tiles.shape[0] * block
    axes.imshow(tiles, extent=(0, side, side, 0), interpolation="none")
    _draw_bands(axes, picture)
    outside = (2 * _BAND + 2 * _GAP) * length
    axes.set_xlim(-outside, length)
    axes.set_ylim(length, -outside)
    axes.set_title(picture.title, fontsize=11, color=INK, pad=10, parse_math=False)
    axes.set_xlabel("key: packed token", color=INK)
    axes.set_ylabel("query: packed token", color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=3, labelsize=9)
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= length]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks)
        axis.set_major_formatter("{x:,.0f}")
    _label_answers(axes, picture)


def _tile_colors(picture: RowPicture, block: int) -> np.ndarray:
    """The picture of the tiles, RGB [query blocks, key blocks, 3]."""
    by_kind = []  # visible pairs of each tile whose key is of a kind
    for kind in range(len(KINDS)):
        keys = set(np.flatnonzero(picture.segment_kinds == kind).tolist())
        by_kind.append(tile_counts(picture.tree, picture.order, block, keys=keys))
    counts = np.sum(by_kind, axis=0)
    classes = np.select([counts == block * block, counts > 0], [2, 1])
    shares = (0.0, _PARTIAL, _FULL)
    palette = np.array([[_blend(COLORS[kind], share) for kind in KINDS] for share in shares])
    return palette[classes, np.argmax(by_kind, axis=0)]


def _blend(color: str, share: float) -> tuple[float, float, float]:
    """`share` of a colour, and white for the rest; RGB in [0, 1]."""
    red, green, blue = (1 - share * (1 - part / 255) for part in bytes.fromhex(color[1:]))
    return red, green, blue


def _draw_bands(axes: Axes, picture: RowPicture) -> None:
    """What the tokens are and which are trained, above the tiles and to their left."""
    length = picture.tree.num_tokens
    width, gap = _BAND * length, _GAP * length
    bands = [
        (picture.kinds == code, -gap - width, width, COLORS[k]) for code, k in enumerate(KINDS)
    ]
    bands.append((picture.trained, -2 * gap - 1.6 * width, 0.6 * width, INK))
    for flags, at, thickness, color in bands:
        edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
        starts, sizes = edges[::2], edges[1::2] - edges[::2]
        for draw in (axes.bar, axes.barh):
            draw(starts, thickness, sizes, at, align="edge", color=color)


def _label_answers(axes: Axes, picture: RowPicture) -> None:
    """Name samples beside the end of their answers, right of the tiles: each, or every n-th."""
    length = picture.tree.num_tokens
    starts = packed_starts(picture.tree, picture.order)
    answers = []  # the middle row of each sample's last segment, where it is trained
    for leaf in picture.tree.leaves:
        start, size = int(starts[leaf.segment]), picture.tree.segments[leaf.segment].length
        if picture.trained[start : start + size].any():
            answers.append((start + size / 2, f"message {leaf.key}"))
    step = -(-len(answers) // _MOST_LABELS)
    named = sorted(answers)[:: step or 1]
    style: dict[str, Any] = {"fontsize": 7.5, "va": "center", "color": INK, "parse_math": False}
    rows = np.array([row for row, _ in named])
    places = _spread(rows, length / _MOST_LABELS, length)
    right = length * 1.035 + 0.1 * np.max(abs(places - rows), initial=0)
    if step > 1:
        axes.text(right + 0.005 * length, -0.04 * length, f"one in {step} is named", **style)
    for (row, name), at in zip(named, places, strict=True):
        axes.plot(
            [length * 1.005, length * 1.02, right],
            [row, row, at],
            color=INK,
            linewidth=0.6,
            alpha=0.5,
            clip_on=False,
        )
        axes.text(right + 0.005 * length, at, name, **style)


def _spread(rows: np.ndarray, distance: float, stop: float) -> np.ndarray:
    """Places in [0, stop], `distance` apart at least, near the ascending `rows`."""
    steps = distance * np.arange(len(rows))
    free = rows - steps
    down = np.maximum.accumulate(free)  # each below the one above it
    up = np.minimum.accumulate(free[::-1])[::-1]
    return np.clip((down + up) / 2, 0, stop - distance * (len(rows) - 1)) + steps


def _add_legend(figure: Figure, pictures: Sequence[RowPicture], block: int) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    codes = [picture.kinds for picture in pictures]
    shown = [KINDS[code] for code in np.unique(np.concatenate(codes))]
    entries: dict[str, Any] = {kind: Patch(facecolor=COLORS[kind]) for kind in shown}
    if any(picture.trained.any() for picture in pictures):
        entries["trained"] = Patch(facecolor=INK)
    for name, share in ((f"full tile, {block} x {block}", _FULL), ("partial tile", _PARTIAL)):
        entries[name] = tuple(Patch(facecolor=_blend(COLORS[kind], share)) for kind in shown)
    figure.legend(
        handles=entries.values(),
        labels=entries.keys(),
        loc="outside lower center",
        ncols=len(entries),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.2,
    )
