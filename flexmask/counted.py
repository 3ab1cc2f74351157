"""A number of things in words, for what people read."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, in the singular for one; `plural` where that is not `noun` + "s".

    >>> counted(1, "bad line"), counted(1200, "bad line"), counted(2, "batch", "batches")
    ('1 bad line', '1,200 bad lines', '2 batches')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
