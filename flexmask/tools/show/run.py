"""One conversation as packed rows that a person can read: as text, and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmask.data.files import read_files
from flexmask.data.sources import find_data_files
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError, pluralize
from flexmask.files import disk_errors
from flexmask.packing.split import split_tree
from flexmask.tools.show.kinds import label_tree
from flexmask.tools.show.orders import papers_order
from flexmask.tools.show.row_figures import COLORS, RowPicture, draw_rows, row_heading
from flexmask.tools.show.tree_text import tree_lines
from flexmask.training.options import load_renderer
from flexmask.tree.layout import lay_out
from flexmask.tree.tree import PrefixTree

_MOST_PICTURES = 12


def show(options: argparse.Namespace, *, width: int, in_color: bool) -> str:
    """The conversation that the options of `flexmask show` name, as text; drawn where they say so.

    Args:
        options: of the command.
        width: columns of the terminal.
        in_color: whether dots have the colours of the picture.

    Raises:
        DataError, TemplateError: the file, the conversation or a number cannot be used.
    """
    renderer = load_renderer(options, str(TOKENIZER_PATH))
    conversation = renderer.conversation(_read(options, renderer.data_columns))
    tree = label_tree(renderer.tree(conversation), conversation, renderer)
    name = Path(conversation.where or "").name
    rows = row_pictures(list(_split(tree, options.max_tokens, name)))
    papers = []
    if options.compare is not None:
        if len(rows) > 1:
            raise DataError(
                f"--compare needs the whole conversation in one row, which takes "
                f"{tree.num_tokens:,} tokens; raise --max_tokens or leave it out"
            )
        papers = [RowPicture(tree, papers_order(tree), "the paper's order (turn by turn):")]
    samples = pluralize(len(tree.leaves), "sample")
    num_tokens, npass = sum(row.tree.num_tokens for row in rows), tree.num_sample_tokens
    if options.output is not None:
        _draw([*rows, *papers], options.output, row_heading(name, tree, num_tokens))
    lines = [
        f"{name}: {pluralize(len(conversation.messages), 'message')}, {samples}",
        f"{num_tokens:,} tokens in a single pass, {npass:,} in N-pass "
        f"({npass / num_tokens:.2f} times as many)",
    ]
    lines.append(f"thinking of earlier turns: {renderer.thinking(conversation)}")
    if len(rows) == 1:
        lines.append(
            f"density {rows[0].density:.3f}: visible pairs per pair in a visited tile of 128 x 128"
        )
    lines += [f"density {picture.density:.3f} in the paper's order" for picture in papers]
    paint = _paint if in_color else None
    for row in rows:
        title = [row.title] if len(rows) > 1 else []
        lines += [
            "",
            *title,
            *tree_lines(row.tree, renderer.tokenizer.decode, width=width, paint=paint),
        ]
    return "\n".join(lines)


def row_pictures(parts: Sequence[PrefixTree]) -> list[RowPicture]:
    """The packed row of each part of a conversation."""
    if len(parts) == 1:
        return [
            RowPicture(
                parts[0],
                lay_out(parts[0]).order.tolist(),
                "heavy-first order (largest branch first):",
            )
        ]
    return [
        RowPicture(
            part,
            lay_out(part).order.tolist(),
            f"row {number} of {len(parts)}: {part.num_tokens:,} tokens, "
            f"{pluralize(len(part.leaves), 'sample')},",
        )
        for number, part in enumerate(parts, start=1)
    ]


def _paint(dot: str, kind: str | None) -> str:
    """The dot in the colour of its kind."""
    red, green, blue = bytes.fromhex(COLORS[kind or "context"][1:])
    return f"\x1b[38;2;{red};{green};{blue}m{dot}\x1b[0m"


def _draw(pictures: Sequence[RowPicture], path: str, heading: str) -> None:
    if len(pictures) > _MOST_PICTURES:
        raise DataError(
            f"--output draws at most {_MOST_PICTURES} rows, got {len(pictures)}; raise --max_tokens"
        )
    with disk_errors(path, "make room, or name another file for --output"):
        draw_rows(pictures, path, heading=heading)


def _read(options: argparse.Namespace, columns: Mapping[str, str] | None) -> Any:
    """The conversation that `--index` names."""
    count, data = 0, options.data or [str(DATA_PATH)]
    conversations = read_files(
        find_data_files(data, options.split), lambda own: own, columns=columns
    )
    for count, conversation in enumerate(conversations, start=1):
        if count > options.index:
            return conversation
    raise DataError(
        f"{', '.join(data)}: has {pluralize(count, 'conversation')}; --index must be in "
        f"[0, {count}), got {options.index}"
    )


def _split(tree: PrefixTree, max_tokens: int | None, name: str) -> Iterator[PrefixTree]:
    if max_tokens is None or tree.num_tokens <= max_tokens:
        yield tree
        return
    split = split_tree(tree, max_tokens)
    if split.too_long:
        leaf = tree.leaves[split.too_long[0]]
        raise DataError(
            f"{name}: the sample of message {leaf.key} must have at most --max_tokens = "
            f"{max_tokens:,} tokens, got {tree.sample_length(leaf)}; raise --max_tokens"
        )
    yield from split.pieces()
