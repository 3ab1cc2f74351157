"""One conversation as packed rows that a person can read: as text, and as a picture."""

from __future__ import annotations

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
from flexmask.tools.show.orders import density, papers_order
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
        rows: the trees of its packed rows: `tree` alone, or its parts where a budget splits it.
    """

    name: str
    num_messages: int
    tree: PrefixTree
    rows: tuple[PrefixTree, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.num_tokens for row in self.rows)

    def row_title(self, number: int) -> str:
        """What stands above a row."""
        row = self.rows[number]
        if len(self.rows) == 1:
            return f"heavy-first order: density {_density(row):.3f}"
        return (
            f"row {number + 1} of {len(self.rows)}: {row.num_tokens:,} tokens, "
            f"{pluralize(len(row.leaves), 'sample')}, density {_density(row):.3f}"
        )


def read_shown(
    data: Sequence[str | os.PathLike[str]],
    index: int,
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ShownConversation:
    """Return conversation `index` of some files, rendered with the tokenizer's template.

    Args:
        data: as in `find_data_files`.
        index: which one, from 0.
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_tokens: budget of a packed row, in tokens; None for no limit.
        chat_template_kwargs: settings for the template.

    Raises:
        DataError, TemplateError: the file, the conversation or a number cannot be used.
    """
    if index < 0:
        raise DataError(f"--index must be at least 0, got {index}")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens must be at least 1, got {max_tokens}")
    conversation = _read(data, index)
    tree = Renderer(tokenizer, chat_template_kwargs=chat_template_kwargs).tree(conversation)
    tree = label_tree(tree, conversation, tokenizer, chat_template_kwargs=chat_template_kwargs)
    name = Path(conversation.where or "").name
    return ShownConversation(
        name, len(conversation.messages), tree, tuple(_split(tree, max_tokens, name))
    )


def shown_text(
    shown: ShownConversation,
    tokenizer: Any,
    *,
    width: int,
    paint: Paint | None = None,
    compare: bool = False,
) -> str:
    """The rows of a conversation as text, after a few lines of figures.

    Args:
        shown: the conversation.
        tokenizer: decodes the tokens.
        width: columns of the terminal.
        paint: as in `tree_lines`.
        compare: add the density of the paper's order.
    """
    tree = shown.tree
    lines = [
        f"{shown.name}: {pluralize(shown.num_messages, 'message')}, "
        f"{pluralize(len(tree.leaves), 'sample')}",
        f"{shown.num_tokens:,} tokens in a single pass, {tree.num_sample_tokens:,} in N-pass "
        f"({tree.num_sample_tokens / shown.num_tokens:.2f} times as many)",
    ]
    if len(shown.rows) == 1:
        lines.append(
            f"density {_density(tree):.3f}: visible pairs per pair in a visited tile of 128 x 128"
        )
    if compare:
        lines.append(f"density {density(tree, papers_order(tree)):.3f} in the paper's order")
    for number, row in enumerate(shown.rows):
        title = [shown.row_title(number)] if len(shown.rows) > 1 else []
        lines += ["", *title, *tree_lines(row, tokenizer.decode, width=width, paint=paint)]
    return "\n".join(lines)


def draw_shown(
    shown: ShownConversation, path: str | os.PathLike[str], *, compare: bool = False
) -> None:
    """Write the rows as a PNG or SVG, with the paper's order beside the row if `compare`.

    Raises:
        DataError: the file cannot be written.
    """
    tree = shown.tree
    pictures = [
        RowPicture(row, lay_out(row).order.tolist(), shown.row_title(number))
        for number, row in enumerate(shown.rows)
    ]
    if compare:
        order = papers_order(tree)
        title = f"the paper's order: density {density(tree, order):.3f}"
        pictures.append(RowPicture(tree, order, title))
    heading = (
        f"{shown.name}: {pluralize(len(tree.leaves), 'sample')}, {shown.num_tokens:,} tokens "
        f"instead of {tree.num_sample_tokens:,}"
    )
    try:
        draw_rows(pictures, path, heading=heading)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_drawable(shown: ShownConversation, *, compare: bool) -> None:
    """Raise DataError for rows that do not fit into one picture."""
    if compare and len(shown.rows) > 1:
        raise DataError(
            f"--compare needs the whole conversation in one row, which takes "
            f"{shown.tree.num_tokens:,} tokens; raise --max_tokens or leave it out"
        )
    if len(shown.rows) > _MOST_PICTURES:
        raise DataError(
            f"--output draws at most {_MOST_PICTURES} rows, got {len(shown.rows)}; "
            "raise --max_tokens"
        )


def _read(data: Sequence[str | os.PathLike[str]], index: int) -> Conversation:
    count = 0
    for conversation in chain.from_iterable(map(read_conversations, find_data_files(data))):
        if count == index:
            return conversation
        count += 1
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


def _density(tree: PrefixTree) -> float:
    return density(tree, lay_out(tree).order.tolist())
