"""A rectangle of land: area, fence, seed and what a change does."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from flexmask.demo.steps import product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn, decimal, plural


def garden(rng: Random) -> Iterator[Turn]:
    """Yields the area of a rectangle, then its fence, its cost and what a change does to it."""
    width, length = rng.randint(6, 19), rng.randint(20, 48)
    place = rng.choice(["garden", "school yard", "playground", "field", "terrace"])
    yield _area(rng, width, length, place)
    more = [
        _fence(rng, width, length),
        _seed(rng, width, length),
        _path(rng, width, length),
    ]
    yield from rng.sample(more, rng.randint(1, 3))
    if rng.random() < 0.6:
        yield _wider(width, length, rng.randint(2, 6))


def _area(rng: Random, width: int, length: int, place: str) -> Turn:
    area = width * length
    return Turn(
        question=rng.choice(
            [
                f"A {place} is {length} meters long and {width} meters wide. What is its area?",
                f"How many square meters is a {place} of {length} by {width} meters?",
            ]
        ),
        plan="The area of a rectangle is length times width, in square meters.",
        work=product(length, width),
        check=f"A rectangle of {length} by {width - width % 5} would have {length} * "
        f"{width - width % 5} = {length * (width - width % 5)}, and {width % 5} more rows add "
        f"{length} * {width % 5} = {length * (width % 5)}. {length * (width - width % 5)} + "
        f"{length * (width % 5)} = {area}.",
        reply=rng.choice(
            [
                f"The area is {area} square meters, {length} times {width}.",
                f"It has {area} square meters. For a rectangle you multiply the two sides.",
            ]
        ),
        value=str(area),
        formula=f"{length} * {width}",
        label=f"the area of the {place}",
        shown=f"{area} square meters",
        rounds=((calculator(f"{length} * {width}", str(area)),),),
    )


def _fence(rng: Random, width: int, length: int) -> Turn:
    around, price = 2 * (length + width), rng.randint(4, 15)
    cost = around * price
    return Turn(
        question=rng.choice(
            [
                f"A fence all around it costs ${price} a meter. How much do I pay for the fence?",
                f"And what does a fence around it cost at ${price} per meter?",
            ]
        ),
        plan="The fence follows the edge, so I need the perimeter and not the area: twice the "
        f"sum of {length} and {width}. Then times {price}.",
        work=f"{length} + {width} = {length + width}. 2 * {length + width} = {around} meters. "
        + product(around, price),
        check=f"Side by side: {length} + {width} + {length} + {width} = {around}, and {cost} / "
        f"{price} = {around}.",
        reply=f"The edge is {around} meters long, so the fence costs ${cost}.",
        value=str(cost),
        formula=f"2 * ({length} + {width}) * {price}",
        label="the cost of the fence",
        shown=f"${cost}",
        rounds=(
            (calculator(f"2 * ({length} + {width})", str(around)),),
            (calculator(f"{around} * {price}", str(cost)),),
        ),
    )


def _seed(rng: Random, width: int, length: int) -> Turn:
    area, covers = width * length, rng.choice([20, 25, 40, 50])
    full, rest = divmod(area, covers)
    bags = full + bool(rest)
    last = f"{full} + 1 = {bags}, as the rest needs a bag too." if rest else "Nothing is left."
    return Turn(
        question=rng.choice(
            [
                f"One bag of grass seed covers {covers} square meters. How many bags do I need "
                "for the whole area?",
                f"How many bags of seed is that if each is enough for {covers} square meters?",
            ]
        ),
        plan=f"The area was {area} square meters. I divide by {covers}, and because I cannot buy "
        "a part of a bag, I round up.",
        work=f"{full} * {covers} = {full * covers} and {area} - {full * covers} = {rest}. {last}",
        check=f"{bags} * {covers} = {bags * covers} is enough for {area}, while {bags - 1} * "
        f"{covers} = {(bags - 1) * covers} is not.",
        reply=f"You need {plural(bags, 'bag')}: they cover {bags * covers} square meters.",
        value=str(bags),
        formula=f"ceil({length} * {width} / {covers})",
        label="the number of bags of seed",
        shown=plural(bags, "bag"),
        rounds=((calculator(f"{area} / {covers}", decimal(area, covers)),),),
    )


def _path(rng: Random, width: int, length: int) -> Turn:
    rounds = rng.randint(5, 12)
    around = 2 * (length + width)
    return Turn(
        question=f"If I walk around its edge {rounds} times, how many meters do I walk?",
        plan=f"Once around is the perimeter of {length} by {width}; I need {rounds} of them.",
        work=f"2 * {length} = {2 * length} and 2 * {width} = {2 * width}. {2 * length} + "
        f"{2 * width} = {around}. {product(around, rounds)}",
        check=f"{around * rounds} / {rounds} = {around}, one round again.",
        reply=f"You walk {around * rounds} meters, as one round is {around} meters.",
        value=str(around * rounds),
        formula=f"2 * ({length} + {width}) * {rounds}",
        label="the way you walk",
        shown=f"{around * rounds} meters",
        rounds=((calculator(f"2 * ({length} + {width}) * {rounds}", str(around * rounds)),),),
    )


def _wider(width: int, length: int, extra: int) -> Turn:
    before, after = width * length, (width + extra) * length
    return Turn(
        question=f"If we make it {extra} meters wider, by how many square meters does it grow?",
        plan=f"Only the width changes, from {width} to {width} plus {extra}. The new strip is "
        f"{length} meters long and {extra} meters wide.",
        work=f"{product(length, extra)} The strip alone is the growth.",
        check=f"The long way: {width} + {extra} = {width + extra}, {length} * {width + extra} = "
        f"{after}, and {after} - {before} = {after - before}.",
        reply=f"It grows by {after - before} square meters, from {before} to {after}.",
        value=str(after - before),
        formula=f"{length} * ({width} + {extra}) - {length} * {width}",
        label="the growth of the area",
        shown=f"{after - before} square meters",
        rounds=((calculator(f"{length} * ({width} + {extra}) - {before}", str(after - before)),),),
    )
