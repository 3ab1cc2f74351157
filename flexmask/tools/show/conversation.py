"""One conversation as packed rows that a person can read: as text, and as a picture."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from flexmask.data.files import find_data_files, read_conversations
from flexmask.data.messages import Conversation
from flexmask.data.trees import Renderer
from flexmask.errors import DataError, pluralize
from flexmask.packing.split import split_tree
from flexmask.tools.show.kinds import label_tree
from flexmask.tools.show.orders import papers_order
from flexmask.tools.show.row_figures import RowPicture, draw_rows
from flexmask.tools.show.tree_text import Paint, tree_lines
from flexmask.tree.layout import lay_out
from flexmask.tree.tree import PrefixTree

_MOST_PICTURES = 12


@dataclass(frozen=True, eq=False)
class ShownConversation:
    """A conversation, rendered and merged.

    Attributes:
        name: where it comes from, such as "tutoring.jsonl:17".
        num_messages: how many messages it has.
        tree: all its samples, each segment of one kind.
        rows: its packed rows: that of `tree` alone, or of its parts where a budget splits it.
        papers_row: that of `tree` in the paper's order, where it is compared.
    """

    name: str
    num_messages: int
    tree: PrefixTree
    rows: Sequence[RowPicture]
    papers_row: RowPicture | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.tree.num_tokens for row in self.rows)


def read_shown(options: argparse.Namespace, tokenizer: Any) -> ShownConversation:
    """The conversation that the options of `flexmask show` name, in its packed rows.

    Raises:
        DataError, TemplateError: the file, the conversation or a number cannot be used.
    """
    max_tokens, settings = options.max_tokens, options.chat_template_kwargs
    conversation = _read(options.data, options.index)
    tree = Renderer(tokenizer, chat_template_kwargs=settings).tree(conversation)
    tree = label_tree(tree, conversation, tokenizer, chat_template_kwargs=settings)
    name = Path(conversation.where or "").name
    parts = list(_split(tree, max_tokens, name))
    if options.compare is not None and len(parts) > 1:
        raise DataError(
            f"--compare needs the whole conversation in one row, which takes "
            f"{tree.num_tokens:,} tokens; raise --max_tokens or leave it out"
        )
    rows = [
        RowPicture(
            part,
            lay_out(part).order.tolist(),
            f"row {number} of {len(parts)}: {part.num_tokens:,} tokens, "
            f"{pluralize(len(part.leaves), 'sample')},"
            if len(parts) > 1
            else "heavy-first order:",
        )
        for number, part in enumerate(parts, start=1)
    ]
    papers_row = None
    if options.compare is not None:
        papers_row = RowPicture(tree, papers_order(tree), "the paper's order:")
    return ShownConversation(name, len(conversation.messages), tree, rows, papers_row)


def shown_text(
    shown: ShownConversation, tokenizer: Any, *, width: int, paint: Paint | None = None
) -> str:
    """The rows of a conversation as text, after a few lines of figures.

    Args:
        shown: the conversation.
        tokenizer: decodes the tokens.
        width: columns of the terminal.
        paint: as in `tree_lines`.
    """
    tree, rows = shown.tree, shown.rows
    lines = [
        f"{shown.name}: {pluralize(shown.num_messages, 'message')}, "
        f"{pluralize(len(tree.leaves), 'sample')}",
        f"{shown.num_tokens:,} tokens in a single pass, {tree.num_sample_tokens:,} in N-pass "
        f"({tree.num_sample_tokens / shown.num_tokens:.2f} times as many)",
    ]
    if len(rows) == 1:
        lines.append(
            f"density {rows[0].density:.3f}: visible pairs per pair in a visited tile of 128 x 128"
        )
    if shown.papers_row is not None:
        lines.append(f"density {shown.papers_row.density:.3f} in the paper's order")
    for row in rows:
        title = [row.title] if len(rows) > 1 else []
        lines += ["", *title, *tree_lines(row.tree, tokenizer.decode, width=width, paint=paint)]
    return "\n".join(lines)


def draw_shown(shown: ShownConversation, path: str | os.PathLike[str]) -> None:
    """Write the rows as a PNG or SVG, with the paper's order beside the row if there is one.

    Raises:
        DataError: there are too many rows for a picture, or the file cannot be written.
    """
    if len(shown.rows) > _MOST_PICTURES:
        raise DataError(
            f"--output draws at most {_MOST_PICTURES} rows, got {len(shown.rows)}; "
            "raise --max_tokens"
        )
    heading = (
        f"{shown.name}: {pluralize(len(shown.tree.leaves), 'sample')}, {shown.num_tokens:,} tokens "
        f"instead of {shown.tree.num_sample_tokens:,}"
    )
    pictures = [*shown.rows, *([shown.papers_row] if shown.papers_row else [])]
    try:
        draw_rows(pictures, path, heading=heading)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None


def _read(data: Sequence[str | os.PathLike[str]], index: int) -> Conversation:
    count = 0
    conversations = chain.from_iterable(map(read_conversations, find_data_files(data)))
    for count, conversation in enumerate(conversations, start=1):
        if count > index:
            return conversation
    raise DataError(
        f"{', '.join(map(str, data))}: has {pluralize(count, 'conversation')}; --index must be in "
        f"[0, {count}), got {index}"
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
