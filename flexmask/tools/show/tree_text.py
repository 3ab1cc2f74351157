"""A prefix tree as text for the terminal: one line per segment, branches drawn to its left.

The heavy path goes down in one column; a branch hangs off the segment that it leaves, before the
path goes on, so that a conversation reads from top to bottom:

    ● context
    ├─● thinking
    │ ● response
    ● response
    ● context
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from flexmask.tree.layout import lay_out
from flexmask.tree.tree import PrefixTree

Decode = Callable[[list[int]], str]
Paint = Callable[[str, str | None], str]

_HEADINGS: tuple[str, ...] = ("packed", "position", "trained")
_TOKENS_PER_COLUMN = 4  # a character takes at most so many tokens of bytes


class _Line(NamedTuple):
    segment: int
    branches: str


def tree_lines(
    tree: PrefixTree, decode: Decode, *, width: int, paint: Paint | None = None
) -> list[str]:
    """The tree as lines of at most `width` columns, a line of headings first.

    Each line has the packed places of the segment's tokens and their positions, both half-open, how
    many of them are trained, the kind, and the beginning of the text with line breaks escaped.

    Args:
        tree: with tokens; segments with or without kinds.
        decode: token ids to text.
        width: columns of the terminal; narrow ones get at least the columns before the text.
        paint: what becomes of a segment's dot, given the dot and the segment's kind.
    """
    if tree.input_ids is None or tree.loss_weights is None:
        raise AssertionError("a tree without tokens has no text")
    lines = list(_walk(tree))
    columns = [_HEADINGS, *_numbers_of(tree, [line.segment for line in lines])]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    numbers = ["  ".join(f"{x:>{n}}" for x, n in zip(r, widths, strict=True)) for r in columns]
    num_branches = max(len(line.branches) for line in lines)
    num_kinds = max(len(segment.kind or "") for segment in tree.segments)
    room = width - len(numbers[0]) - num_branches - num_kinds - 5
    texts = [numbers[0]]
    for (index, branches), number in zip(lines, numbers[1:], strict=True):
        segment = tree.segments[index]
        if segment.parent is None and len(texts) > 1:
            texts.append("")  # between two trees
        start = tree.token_starts[index]
        shown = min(segment.length, _TOKENS_PER_COLUMN * max(room, 0))
        ids = tree.input_ids[start : start + shown]
        filling = " " * (num_branches - len(branches))
        dot = branches[-1] if paint is None else paint(branches[-1], segment.kind)
        kind = f"{segment.kind or '':<{num_kinds}}"
        begin = shorten(decode(ids.tolist()), room)
        texts.append(f"{number}  {branches[:-1]}{dot}{filling} {kind}  {begin}".rstrip())
    return texts


def _numbers_of(tree: PrefixTree, segments: list[int]) -> Iterator[tuple[str, ...]]:
    """Yield for each of `segments` its packed places, positions, and trained tokens."""
    starts, depths = lay_out(tree).starts, tree.depths
    assert tree.loss_weights is not None
    weights = np.split(tree.loss_weights, tree.token_starts[1:])
    for index in segments:
        length = tree.segments[index].length
        trained = np.count_nonzero(weights[index])
        yield (
            f"{starts[index]}:{starts[index] + length}",
            f"{depths[index]}:{depths[index] + length}",
            f"{trained} of {length}",
        )


def shorten(text: str, width: int) -> str:
    r"""`text` in one line of at most `width` columns: control characters escaped, the end cut off.

    >>> print(shorten("one\ntwo three", 10))
    one\ntwo …
    """
    shown = fitting = ""  # `fitting` leaves room for the dots
    columns = 0
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode("ascii")
        shown += character
        columns += sum(map(_width, character))
        if columns < width:
            fitting = shown
        elif columns > width:
            return fitting + "…" if width > 0 else ""
    return shown


def _width(character: str) -> int:
    """Columns of a terminal that a printable character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _walk(tree: PrefixTree) -> Iterator[_Line]:
    """Yield the segments in drawing order, each with the branches to its left."""
    children: dict[int | None, list[int]] = {}
    for segment in lay_out(tree).order.tolist():  # heaviest child first
        children.setdefault(tree.segments[segment].parent, []).append(segment)
    stack = [_Line(root, "●") for root in reversed(children[None])]
    while stack:
        line = stack.pop()
        yield line
        heavy, light = children.get(line.segment, [])[:1], children.get(line.segment, [])[1:]
        rail = line.branches[:-1].replace("├", "│").replace("─", " ")
        stack.extend(_Line(segment, rail + "●") for segment in heavy)
        stack.extend(_Line(segment, rail + "├─●") for segment in sorted(light, reverse=True))
