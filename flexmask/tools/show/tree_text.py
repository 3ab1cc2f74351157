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

import numpy as np

from flexmask.tree.layout import lay_out
from flexmask.tree.tree import PrefixTree

Decode = Callable[[list[int]], str]
Paint = Callable[[str, str | None], str]

_TOKENS_PER_COLUMN = 4  # a character takes at most so many tokens of bytes


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
    starts, depths = lay_out(tree).starts, tree.depths
    trained = np.add.reduceat(tree.loss_weights > 0, tree.token_starts, dtype=np.int64)
    lines = list(_walk(tree))
    rows = [("packed", "position", "trained")]
    for index, _ in lines:
        length = tree.segments[index].length
        places, positions = (f"{a[index]}:{a[index] + length}" for a in (starts, depths))
        rows.append((places, positions, f"{trained[index]} of {length}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = ["  ".join(f"{x:>{n}}" for x, n in zip(r, widths, strict=True)) for r in rows]
    num_branches = max(len(branches) for _, branches in lines)
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


def _walk(tree: PrefixTree) -> Iterator[tuple[int, str]]:
    """Yield the segments in drawing order, each with the branches to its left."""
    children: dict[int | None, list[int]] = {}
    for segment in lay_out(tree).order.tolist():  # heaviest child first
        children.setdefault(tree.segments[segment].parent, []).append(segment)
    stack = [(root, "●") for root in reversed(children[None])]
    while stack:
        segment, branches = stack.pop()
        yield segment, branches
        rail = branches[:-1].replace("├", "│").replace("─", " ")
        below = children.get(segment, [])
        stack.extend((child, rail + "●") for child in below[:1])
        stack.extend((child, rail + "├─●") for child in sorted(below[1:], reverse=True))
