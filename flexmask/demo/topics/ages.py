"""Two ages: their difference never changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from flexmask.demo.steps import product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import NAMES, Turn

_ELDERS = ["father", "mother", "uncle", "aunt", "teacher"]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A child and an elder who is `times` as old."""

    name: str
    elder: str
    young: int
    times: int

    @property
    def old(self) -> int:
        """The age of the elder."""
        return self.young * self.times


def ages(rng: Random) -> Iterator[Turn]:
    """Yields a question on two ages, then on their past and future."""
    times = rng.choice([3, 4, 5])
    pair = _Pair(rng.choice(NAMES), rng.choice(_ELDERS), rng.randint(30, 50) // times, times)
    yield _elder(rng, pair)
    more = [_difference, _sum_later, _twice]
    chosen = sorted(rng.sample(range(3), rng.randint(2, 3)))
    for index in chosen:
        yield more[index](rng, pair)
    if 2 in chosen:
        yield _then(rng, pair)


def _elder(rng: Random, pair: _Pair) -> Turn:
    return Turn(
        question=rng.choice(
            [
                f"{pair.name} is {pair.young} years old, and {pair.name}'s {pair.elder} is "
                f"{pair.times} times as old. How old is the {pair.elder}?",
                f"My friend {pair.name} is {pair.young}. The {pair.elder} of {pair.name} is "
                f"{pair.times} times that age. What age is that?",
            ]
        ),
        plan=f"{pair.times} times as old means that I multiply the age of {pair.name} by "
        f"{pair.times}.",
        work=product(pair.young, pair.times),
        check=f"{' + '.join([str(pair.young)] * pair.times)} = {pair.old}, and {pair.old} is a "
        f"sensible age for someone's {pair.elder}.",
        reply=f"The {pair.elder} is {pair.old} years old, {pair.times} times {pair.young}.",
        value=str(pair.old),
        formula=f"{pair.young} * {pair.times}",
        label=f"the age of the {pair.elder}",
        shown=f"{pair.old} years",
    )


def _difference(rng: Random, pair: _Pair) -> Turn:
    gap = pair.old - pair.young
    return Turn(
        question=f"How old was the {pair.elder} when {pair.name} was born?",
        plan="The difference of two ages never changes. When one of them was 0, the other was "
        "exactly the difference.",
        work=f"{pair.old} - {pair.young} = {gap}.",
        check=f"{pair.young} years later both are that much older: 0 + {pair.young} = "
        f"{pair.young} and {gap} + {pair.young} = {pair.old}, as today.",
        reply=f"The {pair.elder} was {gap}: the difference between {pair.old} and {pair.young} "
        "stays the same for ever.",
        value=str(gap),
        formula=f"{pair.young} * {pair.times} - {pair.young}",
        label="the difference of the ages",
        shown=f"{gap} years",
    )


def _sum_later(rng: Random, pair: _Pair) -> Turn:
    years, now = rng.randint(3, 12), pair.old + pair.young
    return Turn(
        question=f"In {years} years, what will their ages add up to?",
        plan=f"Today they are {pair.young} and {pair.old}. Both get {years} years older, so the "
        "sum grows twice as fast.",
        work=f"{pair.young} + {pair.old} = {now}. 2 * {years} = {2 * years}. {now} + {2 * years} "
        f"= {now + 2 * years}.",
        check=f"One by one: {pair.young} + {years} = {pair.young + years}, {pair.old} + {years} = "
        f"{pair.old + years}, {pair.young + years} + {pair.old + years} = {now + 2 * years}.",
        reply=f"Their ages will add up to {now + 2 * years}: {pair.young + years} and "
        f"{pair.old + years}.",
        value=str(now + 2 * years),
        formula=f"{pair.young} * {pair.times} + {pair.young} + 2 * {years}",
        label=f"the sum of the ages in {years} years",
        rounds=(
            (
                calculator(f"{pair.young} + {years}", str(pair.young + years)),
                calculator(f"{pair.old} + {years}", str(pair.old + years)),
            ),
            (calculator(f"{pair.young + years} + {pair.old + years}", str(now + 2 * years)),),
        ),
    )


def _twice(rng: Random, pair: _Pair) -> Turn:
    gap = pair.old - pair.young
    years = gap - pair.young
    return Turn(
        question=f"In how many years will the {pair.elder} be just twice as old as {pair.name}?",
        plan="When one is twice as old as the other, the younger one's age equals the "
        f"difference. And the difference is always {pair.old} minus {pair.young}.",
        work=f"{pair.old} - {pair.young} = {gap}. So {pair.name} has to be {gap}. {gap} - "
        f"{pair.young} = {years}.",
        check=f"Then: {pair.young} + {years} = {gap}, {pair.old} + {years} = {pair.old + years}, "
        f"and 2 * {gap} = {2 * gap}. Correct.",
        reply=f"In {years} years: then {pair.name} is {gap} and the {pair.elder} is "
        f"{pair.old + years}.",
        value=str(years),
        formula=f"{pair.young} * {pair.times} - {pair.young} - {pair.young}",
        label=f"the time until the {pair.elder} is twice as old",
        shown=f"{years} years",
    )


def _then(rng: Random, pair: _Pair) -> Turn:
    gap = pair.old - pair.young
    return Turn(
        question=f"And how old is the {pair.elder} at that time?",
        plan=f"The {pair.elder} is {pair.old} now, and we found {gap - pair.young} years until "
        "then.",
        work=f"{pair.old} + {gap - pair.young} = {2 * gap}.",
        check=f"Half of that is {2 * gap} / 2 = {gap}, the age of {pair.name} at that time.",
        reply=f"The {pair.elder} is {2 * gap} then, twice the {gap} years of {pair.name}.",
        value=str(2 * gap),
        formula=f"2 * ({pair.young} * {pair.times} - {pair.young})",
        label=f"the age of the {pair.elder} at that time",
        shown=f"{2 * gap} years",
    )
