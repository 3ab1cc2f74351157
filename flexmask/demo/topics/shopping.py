"""Shopping lists: totals in dollars and cents, and what comes after them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from flexmask.demo.steps import money_product
from flexmask.demo.tools import calculator
from flexmask.demo.topics.paying import Bill, change, discount, months, share, tax
from flexmask.demo.turn import Turn, dollars

_GOODS = {
    "stationery": [
        ("notebooks", 22, 55),
        ("pens", 8, 24),
        ("folders", 12, 36),
        ("rulers", 9, 21),
        ("erasers", 5, 12),
    ],
    "groceries": [
        ("apples", 4, 9),
        ("loaves of bread", 21, 48),
        ("yoghurts", 7, 16),
        ("melons", 25, 52),
    ],
    "party": [
        ("balloons", 3, 9),
        ("paper hats", 6, 15),
        ("juice bottles", 14, 32),
        ("pizzas", 62, 118),
    ],
    "garden": [
        ("seed packets", 14, 32),
        ("flower pots", 26, 74),
        ("bags of soil", 41, 89),
        ("tomato plants", 18, 39),
    ],
    "sports": [
        ("tennis balls", 12, 27),
        ("water bottles", 48, 96),
        ("towels", 51, 115),
        ("jump ropes", 37, 84),
    ],
}


def shopping(rng: Random) -> Iterator[Turn]:
    """Yields a shopping list and what comes after it."""
    shop = rng.choice(sorted(_GOODS))
    goods = rng.sample(_GOODS[shop], len(_GOODS[shop]))
    bill = Bill(0, "", f"the {shop} total", goods[rng.choice([2, 2, 3]) :])
    yield _total(rng, bill, goods[: len(goods) - len(bill.spare)])
    changes = rng.sample([_more, discount, tax], rng.randint(1, 3))
    uses = rng.sample([change, share, months], rng.randint(1, 2))
    for follow_up in changes + uses:
        if turn := follow_up(rng, bill):
            yield turn


def _total(rng: Random, bill: Bill, goods: list[tuple[str, int, int]]) -> Turn:
    lines = [(rng.randint(2, 9), name, 10 * rng.randint(low, high)) for name, low, high in goods]
    wanted = [f"{count} {name} at ${dollars(price)} each" for count, name, price in lines]
    listing = ", ".join(wanted[:-1]) + " and " + wanted[-1]
    bill.cents = sum(count * price for count, _, price in lines)
    bill.formula = " + ".join(f"{count} * {dollars(price)}" for count, _, price in lines)
    parts = [dollars(count * price) for count, _, price in lines]
    return Turn(
        question=rng.choice(
            [
                f"I want to buy {listing}. How much is that altogether?",
                f"My shopping list: {listing}. What is the total?",
                f"Can you help me add up a bill? It has {listing}.",
            ]
        ),
        plan=rng.choice(
            [
                f"The list has {len(lines)} lines. I need the price of each line first, and then "
                "their sum.",
                f"The student wants the sum of {len(lines)} lines. Count times price for each, "
                "then add.",
            ]
        ),
        work=" ".join(
            f"For the {name}: {count} * {dollars(price)} = {dollars(count * price)}."
            for count, name, price in lines
        )
        + f" Adding up: {' + '.join(parts)} = {bill.text}.",
        check=_second_look(lines, parts, bill),
        reply=rng.choice(
            [
                f"Altogether it is ${bill.text}. The lines are "
                + " and ".join(
                    f"${part} for the {name}"
                    for part, (_, name, _) in zip(parts, lines, strict=True)
                )
                + ".",
                f"The total is ${bill.text}. Multiply each price by how many you take, then add "
                f"the {len(lines)} lines.",
            ]
        ),
        value=bill.text,
        formula=bill.formula,
        label=bill.name,
        shown=f"${bill.text}",
        rounds=((calculator(bill.formula, bill.text),),),
    )


def _second_look(lines: list[tuple[int, str, int]], parts: list[str], bill: Bill) -> str:
    """Returns an estimate in whole dollars, or the sum backwards where a price is below one."""
    if min(price for _, _, price in lines) < 100:
        left = dollars(bill.cents - lines[-1][0] * lines[-1][2])
        return f"Taking the last line away again, {bill.text} - {parts[-1]} = {left}, " + (
            f"and {' + '.join(parts[:-1])} = {left}. It fits."
        )
    rounded = [count * ((price + 50) // 100) for count, _, price in lines]
    rough = sum(rounded)
    verdict = "close to" if abs(100 * rough - bill.cents) < 200 else "in the same range as"
    estimate = " + ".join(map(str, rounded))
    return f"With whole dollars: {estimate} = {rough}, which is {verdict} {bill.text}."


def _more(rng: Random, bill: Bill) -> Turn | None:
    if not bill.spare:
        return None
    name, low, high = bill.spare.pop()
    count, price = rng.randint(2, 8), 10 * rng.randint(low, high)
    before, extra = bill.text, count * price
    bill.formula = f"({bill.formula}) + {count} * {dollars(price)}"
    bill.cents += extra
    bill.name = f"the amount with the {name}"
    return Turn(
        question=rng.choice(
            [
                f"I forgot the {name}! {count} of them at ${dollars(price)} each. What is it now?",
                f"And if I also take {count} {name} at ${dollars(price)} each?",
            ]
        ),
        plan=f"So far it was {before}. Only the {name} are new, so I add their line to that "
        "amount and leave the rest alone.",
        work=money_product(price, count) + f" Then {before} + {dollars(extra)} = {bill.text}.",
        check=f"Going back, {bill.text} - {dollars(extra)} = {before}, which is where we started.",
        reply=rng.choice(
            [
                f"The {name} add ${dollars(extra)}, so it is now ${bill.text}.",
                f"Now it is ${bill.text}: the ${before} from before and ${dollars(extra)} for the "
                f"{name}.",
            ]
        ),
        value=bill.text,
        formula=bill.formula,
        label=bill.name,
        shown=f"${bill.text}",
        rounds=((calculator(f"{before} + {count} * {dollars(price)}", bill.text),),),
    )
