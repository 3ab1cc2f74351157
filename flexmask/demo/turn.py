"""What a tutoring turn is made of, before it becomes chat messages.

A turn carries its answer twice: as text, reached by the steps in its thinking, and as a formula in
the numbers and dates that the student said. To evaluate the formula is to check the steps without
following them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a tool, with what the tool sends back.

    Attributes:
        name: name of the tool, one of `flexmask.demo.tools.SCHEMAS`.
        arguments: its arguments by name.
        result: the tool's answer, an object that JSON can hold.
    """

    name: str
    arguments: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question of the student with all that the tutor thinks and says about it.

    Attributes:
        question: what the student says.
        plan: thinking: what is asked, and which way leads there.
        work: thinking: the way, step by step; equations stand as `a + b = c`, in plain numbers.
        check: thinking: a second look at the result.
        reply: what the tutor says; holds `value`.
        value: the answer as text, without a unit.
        formula: the answer as an expression in the numbers and dates that the student gave.
        label: what the value is called later ("the total"), or "" for nothing worth recalling.
        shown: the value with its unit ("$4.50"); `value` where empty.
        rounds: how tools find the answer instead of `work`: the calls of each round, in order.
    """

    question: str
    plan: str
    work: str
    check: str
    reply: str
    value: str
    formula: str
    label: str = ""
    shown: str = ""
    rounds: tuple[tuple[Call, ...], ...] = ()


NAMES = ["Mia", "Noah", "Aisha", "Leo", "Yuki", "Sofia", "Omar", "Clara", "Ravi", "Elena"]
"""First names of people in the problems."""

Topic = Callable[[Random], Iterator[Turn]]
"""Yields one problem and its follow-up questions, 2 to 6 turns."""


def dollars(cents: int) -> str:
    """Returns an amount as text: 450 as "4.50"."""
    return f"{cents // 100}.{cents % 100:02d}"


def decimal(numerator: int, denominator: int) -> str:
    """Returns a quotient that ends within three decimals, as text: (5, 2) as "2.5".

    Raises:
        ValueError: if it has more decimals.
    """
    thousandths, rest = divmod(1000 * numerator, denominator)
    if rest:
        raise ValueError(f"{numerator} / {denominator} has more than three decimals")
    whole, part = divmod(thousandths, 1000)
    return f"{whole}.{part:03d}".rstrip("0").rstrip(".")


def ordinal(number: int) -> str:
    """Returns an ordinal number: 2 as "2nd"."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 11 <= number % 100 <= 13 else suffix}"


def plural(count: int, noun: str) -> str:
    """Returns a count with its noun: "1 day", "3 days"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
