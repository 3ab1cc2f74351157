"""Equal bags from two kinds of things: greatest common divisors."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from random import Random

from flexmask.demo.steps import division, euclid, half, product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn

_PAIRS = [
    ("apples", "pears"),
    ("red beads", "blue beads"),
    ("cookies", "sweets"),
    ("roses", "tulips"),
    ("stickers", "pencils"),
]


def bags(rng: Random) -> Iterator[Turn]:
    """Yields a question on the most identical bags of two kinds, then on one bag."""
    common = rng.choice([6, 8, 9, 12, 14, 15, 16, 18, 21, 24])
    small, large = rng.choice([(2, 3), (3, 4), (2, 5), (3, 5), (4, 5), (4, 7), (5, 7), (3, 8)])
    a, b = common * large, common * small
    first, second = rng.choice(_PAIRS)
    yield _most_bags(rng, a, b, first, second)
    yield _in_one_bag(rng, a, b, first)
    price = rng.randint(2, 9)
    more = [_whole_bag(rng, a, b), _bag_income(a, b, price), _common_multiple(rng, a, b)]
    yield from rng.sample(more, rng.randint(1, 3))


def _most_bags(rng: Random, a: int, b: int, first: str, second: str) -> Turn:
    common = gcd(a, b)
    return Turn(
        question=rng.choice(
            [
                f"I have {a} {first} and {b} {second} and want to fill identical bags with "
                "nothing left over. What is the largest number of bags?",
                f"What is the largest number of equal bags that I can make from {a} {first} and "
                f"{b} {second}, using all of them?",
            ]
        ),
        plan="The number of bags has to divide both counts, and it should be as large as "
        f"possible: the greatest common divisor of {a} and {b}. Euclid's algorithm finds it.",
        work=euclid(a, b),
        check=f"{a} / {common} = {a // common} and {b} / {common} = {b // common}, and these two "
        "share no divisor above 1, so no larger number of bags works.",
        reply=rng.choice(
            [
                f"You can fill {common} bags: {common} is the greatest common divisor of {a} and "
                f"{b}.",
                f"The most is {common} bags, since {common} is the largest number that divides "
                f"both {a} and {b}.",
            ]
        ),
        value=str(common),
        formula=f"gcd({a}, {b})",
        label="the largest number of bags",
    )


def _in_one_bag(rng: Random, a: int, b: int, first: str) -> Turn:
    common = gcd(a, b)
    return Turn(
        question=rng.choice(
            [
                f"How many {first} are in each bag then?",
                f"So how many {first} does one bag hold?",
            ]
        ),
        plan=f"We found {common} bags, and the {a} {first} are spread evenly over them.",
        work=division(a, common),
        check=f"The other way round, {a // common} * {common} = {a}, all the {first} are used.",
        reply=f"Each of the {common} bags holds {a // common} {first}.",
        value=str(a // common),
        formula=f"{a} / gcd({a}, {b})",
        label=f"the number of {first} in a bag",
        rounds=((calculator(f"{a} / {common}", str(a // common)),),),
    )


def _whole_bag(rng: Random, a: int, b: int) -> Turn:
    common = gcd(a, b)
    each = (a + b) // common
    return Turn(
        question="And how many things are in one bag altogether?",
        plan=f"Everything together, divided by the {common} bags.",
        work=f"{a} + {b} = {a + b} things. {division(a + b, common)}",
        check=f"Kind by kind: {a} / {common} = {a // common} and {b} / {common} = {b // common}, "
        f"and {a // common} + {b // common} = {each}.",
        reply=rng.choice(
            [
                f"One bag has {each} things in it: {a // common} of the first kind and "
                f"{b // common} of the second.",
                f"There are {each} in each bag, because {a + b} things go into {common} bags.",
            ]
        ),
        value=str(each),
        formula=f"({a} + {b}) / gcd({a}, {b})",
        label="the number of things in one bag",
        rounds=((calculator(f"({a} + {b}) / {common}", str(each)),),),
    )


def _bag_income(a: int, b: int, price: int) -> Turn:
    common = gcd(a, b)
    return Turn(
        question=f"If I sell every bag for ${price}, how much money do I get?",
        plan=f"There are {common} bags and each one brings {price} dollars, so it is a product.",
        work=product(common, price),
        check=f"Half of the bags would bring {common} * {price} / 2 = {half(common * price)}, and "
        f"twice that is {common * price} again.",
        reply=f"{common} bags at ${price} each bring ${common * price}.",
        value=str(common * price),
        formula=f"gcd({a}, {b}) * {price}",
        label="the money for all bags",
        shown=f"${common * price}",
        rounds=((calculator(f"{common} * {price}", str(common * price)),),),
    )


def _common_multiple(rng: Random, a: int, b: int) -> Turn:
    common = gcd(a, b)
    multiple = a * b // common
    return Turn(
        question=rng.choice(
            [
                f"While we are at it: what is the least common multiple of {a} and {b}?",
                "Can the number of bags also give me the least common multiple of the two counts?",
            ]
        ),
        plan=f"The product of two numbers equals their gcd times their lcm. The gcd is {common}, "
        f"so I divide one number by {common} first and keep the numbers small.",
        work=f"{a} / {common} = {a // common}. {product(b, a // common)}",
        check=f"{multiple} / {a} = {multiple // a} and {multiple} / {b} = {multiple // b} are "
        "whole numbers without a common divisor, as it should be.",
        reply=f"The least common multiple is {multiple}. Divide {a} by {common} and multiply by "
        f"{b}.",
        value=str(multiple),
        formula=f"{a} * {b} / gcd({a}, {b})",
        label="the least common multiple",
        rounds=((calculator(f"{a} * {b} / {common}", str(multiple)),),),
    )
