"""Arithmetic sequences: step, terms, sums and places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random

from flexmask.demo.steps import division, half, product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn, ordinal


def sequence(rng: Random) -> Iterator[Turn]:
    """Yields questions on an arithmetic sequence, each built on the rule found first."""
    start, step = rng.randint(2, 30), rng.randint(3, 12)
    place = rng.randint(12, 40)
    yield _step(start, step)
    yield _term(rng, start, step, place)
    more = [
        _sum(start, step, place),
        _place_of(start, step, place + rng.randint(5, 20)),
        _first_above(rng, start, step),
    ]
    yield from rng.sample(more, rng.randint(1, 3))


def _step(start: int, step: int) -> Turn:
    terms = [start + index * step for index in range(4)]
    gaps = ", ".join(f"{b} - {a} = {b - a}" for a, b in pairwise(terms))
    return Turn(
        question=f"A sequence begins {', '.join(map(str, terms))}. By how much does it grow each "
        "time?",
        plan="To see the rule I look at the difference of each pair of neighbours.",
        work=f"{gaps}. All the differences are the same.",
        check=f"So the next term would be {terms[-1]} + {step} = {terms[-1] + step}.",
        reply=f"It grows by {step} each time, so it is an arithmetic sequence.",
        value=str(step),
        formula=f"{terms[1]} - {terms[0]}",
        label="the step of the sequence",
    )


def _term(rng: Random, start: int, step: int, place: int) -> Turn:
    value = start + (place - 1) * step
    return Turn(
        question=rng.choice(
            [f"What is the {ordinal(place)} term?", f"Which number stands at place {place}?"]
        ),
        plan=f"The first term is {start} and I add {step} for each further place, which is one "
        "time fewer than the place.",
        work=f"{place} - 1 = {place - 1} times. {product(place - 1, step)} {start} + "
        f"{(place - 1) * step} = {value}.",
        check=f"The {ordinal(place - 1)} term must be {value} - {step} = {value - step}, and "
        f"{start} + {place - 2} * {step} = {value - step}.",
        reply=f"The {ordinal(place)} term is {value}: start at {start} and take {place - 1} steps "
        f"of {step}.",
        value=str(value),
        formula=f"{start} + ({place} - 1) * ({start + step} - {start})",
        label=f"the {ordinal(place)} term",
        rounds=((calculator(f"{start} + ({place} - 1) * {step}", str(value)),),),
    )


def _sum(start: int, step: int, place: int) -> Turn:
    last = start + (place - 1) * step
    total = (start + last) * place // 2
    return Turn(
        question=f"And the sum of all the terms from the first to the {ordinal(place)}?",
        plan="First and last, second and last but one: each such pair has the same sum. The last "
        f"term is {last} as we found.",
        work=f"{start} + {last} = {start + last}. {product(start + last, place)} Half of it: "
        f"{(start + last) * place} / 2 = {total}.",
        check=f"The mean of the terms is {start + last} / 2 = {half(start + last)}, and "
        f"{half(start + last)} * {place} = {total}.",
        reply=f"The sum of the first {place} terms is {total}, the mean of first and last times "
        f"{place}.",
        value=str(total),
        formula=f"({start} + {start} + ({place} - 1) * ({start + step} - {start})) * {place} / 2",
        label=f"the sum of the first {place} terms",
        rounds=((calculator(f"({start} + {last}) * {place} / 2", str(total)),),),
    )


def _place_of(start: int, step: int, place: int) -> Turn:
    value = start + (place - 1) * step
    return Turn(
        question=f"At which place does {value} come?",
        plan=f"The way from {start} to {value} goes in steps of {step}. The place is the number "
        "of steps plus one.",
        work=f"{value} - {start} = {value - start}. {division(value - start, step)} {place - 1} + "
        f"1 = {place}.",
        check=f"{start} + {place - 1} * {step} = {value}, so the count is right.",
        reply=f"{value} is at place {place}, after {place - 1} steps of {step}.",
        value=str(place),
        formula=f"({value} - {start}) / ({start + step} - {start}) + 1",
        label=f"the place of {value}",
        rounds=((calculator(f"({value} - {start}) / {step} + 1", str(place)),),),
    )


def _first_above(rng: Random, start: int, step: int) -> Turn:
    limit = rng.choice([100, 200, 250, 300, 500])
    steps = (limit - start) // step + 1
    value = start + steps * step
    return Turn(
        question=f"What is the first number in it that is larger than {limit}?",
        plan=f"I see how many whole steps of {step} fit between {start} and {limit}, and then "
        "take one more.",
        work=f"{limit} - {start} = {limit - start}. {division(limit - start, step)} One more "
        f"step: {steps - 1} + 1 = {steps}. {start} + {steps} * {step} = {value}.",
        check=f"The one before is {value} - {step} = {value - step}, which is not above {limit}.",
        reply=f"The first term above {limit} is {value}; the one before it is {value - step}.",
        value=str(value),
        formula=f"{start} + (({limit} - {start}) // ({start + step} - {start}) + 1) * "
        f"({start + step} - {start})",
        label=f"the first term above {limit}",
    )
