"""Conversations that were rendered plainly: every prompt whole, exactly so but slower."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexmask.errors import pluralize


@dataclass(slots=True)
class RenderedPlainly:
    """How many conversations could not be rendered with what is remembered of earlier turns.

    Attributes:
        conversations: how many.
        first: where the first stands, and why; empty while there is none.
    """

    conversations: int = 0
    first: str = ""

    def add(self, where: str, reason: str) -> None:
        """Count one conversation."""
        self.plus(RenderedPlainly(1, f"{where}: {reason}"))

    def plus(self, later: RenderedPlainly) -> None:
        """Count those of data that come after."""
        self.first = self.first or later.first
        self.conversations += later.conversations

    def __str__(self) -> str:
        many = pluralize(self.conversations, "conversation was", "conversations were")
        return f"slow: {many} rendered plainly; the first, {self.first}"


def reason_of(error: Exception) -> str:
    """What an error says, in one line that is the same in every run."""
    said = " ".join(str(error).split())
    return re.sub(r"0x[0-9a-f]+", "0x...", f"{type(error).__name__}: {said}")
