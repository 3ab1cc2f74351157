"""Things packed into boxes: quotients and remainders."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from flexmask.demo.steps import division, product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn, plural

_PACKED = [
    ("eggs", "box"),
    ("bottles", "crate"),
    ("books", "shelf"),
    ("tiles", "pack"),
    ("chairs", "row"),
]


_PLURALS = {"box": "boxes", "crate": "crates", "shelf": "shelves", "pack": "packs", "row": "rows"}


def boxes(rng: Random) -> Iterator[Turn]:
    """Yields a question on full boxes and remainders, then on what changes them."""
    size, total = rng.choice([6, 8, 9, 12, 15, 16, 24]), rng.randint(110, 390)
    total += int(total % size == 0)
    things, box = rng.choice(_PACKED)
    yield _full_boxes(rng, total, size, things, box)
    more = [_left_over, _to_fill, _all_boxes, _other_size]
    chosen = sorted(rng.sample(range(len(more)), rng.randint(2, 4)))
    for index in chosen:
        yield more[index](rng, total, size, things, box)


def _full_boxes(rng: Random, total: int, size: int, things: str, box: str) -> Turn:
    full, rest = divmod(total, size)
    return Turn(
        question=rng.choice(
            [
                f"There are {total} {things} and each {box} takes {size}. How many full "
                f"{_PLURALS[box]} is that?",
                f"I am packing {total} {things}, {size} to a {box}. How many {_PLURALS[box]} get "
                "completely full?",
            ]
        ),
        plan=f"How often does {size} fit into {total}? I build it up from a multiple of ten.",
        work=_chunks(total, size),
        check=f"{full} * {size} + {rest} = {total}, and {rest} is less than {size}, so another "
        "one cannot be filled.",
        reply=rng.choice(
            [
                f"{full} {_PLURALS[box]} are full, and some {things} are left over.",
                f"You get {full} full {_PLURALS[box]}, because {full} times {size} is "
                f"{full * size}.",
            ]
        ),
        value=str(full),
        formula=f"{total} // {size}",
        label=f"the number of full {_PLURALS[box]}",
        rounds=((calculator(f"({total} - {total} % {size}) / {size}", str(full)),),),
    )


def _chunks(total: int, size: int) -> str:
    full = total // size
    tens = full - full % 10
    if not tens or tens == full:
        return division(total, size)
    rest = total - size * tens
    return f"{size} * {tens} = {size * tens}, and {total} - {size * tens} = {rest} is left. " + (
        f"In the rest: {division(rest, size)} {tens} + {full - tens} = {full}."
    )


def _left_over(rng: Random, total: int, size: int, things: str, box: str) -> Turn:
    full, rest = divmod(total, size)
    return Turn(
        question=f"How many {things} are left over?",
        plan=f"The {full} full {_PLURALS[box]} use up a multiple of {size}; I take it away from "
        f"{total}.",
        work=f"{product(full, size)} {total} - {full * size} = {rest}.",
        check=f"The remainder has to be smaller than {size}, and {rest} is.",
        reply=f"{full * size} {things} are packed, so the number left over is {rest}.",
        value=str(rest),
        formula=f"{total} % {size}",
        label=f"the number of {things} left over",
        rounds=((calculator(f"{total} % {size}", str(rest)),),),
    )


def _to_fill(rng: Random, total: int, size: int, things: str, box: str) -> Turn:
    full, rest = divmod(total, size)
    return Turn(
        question=f"How many more {things} would I need to fill one more {box}?",
        plan=f"After {full} full {_PLURALS[box]} there are some {things} in the next {box} "
        f"already. The remainder of {total} by {size} tells how many.",
        work=f"{full} * {size} = {full * size}. {total} - {full * size} = {rest}. {size} - {rest} "
        f"= {size - rest} are missing.",
        check=f"{total} + {size - rest} = {total + size - rest}, and {full + 1} * {size} = "
        f"{(full + 1) * size}. The same number.",
        reply=f"You need {size - rest} more, because {rest} of the {size} places are taken.",
        value=str(size - rest),
        formula=f"{size} - {total} % {size}",
        label=f"the number of missing {things}",
        rounds=((calculator(f"{size} - {total} % {size}", str(size - rest)),),),
    )


def _all_boxes(rng: Random, total: int, size: int, things: str, box: str) -> Turn:
    full, rest = divmod(total, size)
    return Turn(
        question=f"How many {_PLURALS[box]} do I need so that all the {things} have a place?",
        plan=f"We have {full} full {_PLURALS[box]}. If anything remains, it needs one more.",
        work=f"{full} * {size} = {full * size} and {total} - {full * size} = {rest}, which is "
        f"more than nothing. So {full} + 1 = {full + 1}.",
        check=f"{full + 1} * {size} = {(full + 1) * size} places are enough for {total}, and "
        f"{full * size} were not.",
        reply=f"{full + 1} {_PLURALS[box]}: the {full} full ones and one for the last {rest}.",
        value=str(full + 1),
        formula=f"{total} // {size} + 1",
        label=f"the number of {_PLURALS[box]} for everything",
    )


def _other_size(rng: Random, total: int, size: int, things: str, box: str) -> Turn:
    other = rng.choice([number for number in (5, 7, 10, 11, 13, 14, 18, 20) if number != size])
    full, rest = divmod(total, other)
    return Turn(
        question=f"What if each {box} takes {other} instead? How many are full then?",
        plan=f"Still {total} {things}, but now I divide by {other} and not by {size}.",
        work=_chunks(total, other),
        check=f"{full} * {other} + {rest} = {total}. With the old size it was {total // size}, and "
        + ("larger means fewer, fine." if other > size else "smaller means more, fine."),
        reply=f"With {other} in each {box} you fill {full} of them, and {plural(rest, 'place')} "
        f"of the next one {'is' if rest == 1 else 'are'} taken.",
        value=str(full),
        formula=f"{total} // {other}",
        label=f"the number of full {_PLURALS[box]} of {other}",
        rounds=((calculator(f"({total} - {total} % {other}) / {other}", str(full)),),),
    )
