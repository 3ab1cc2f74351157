"""Paying a bill: discounts, tax, change, sharing and regular buys."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from flexmask.demo.steps import money_product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn, dollars


@dataclass(slots=True)
class Bill:
    """What the student has to pay so far.

    Attributes:
        cents: the amount.
        formula: the amount in the student's numbers, in dollars.
        name: how the tutor calls it.
        spare: goods that are not on the list yet.
    """

    cents: int
    formula: str
    name: str
    spare: list[tuple[str, int, int]]

    @property
    def text(self) -> str:
        """The amount as text, without the dollar sign."""
        return dollars(self.cents)


def discount(rng: Random, bill: Bill) -> Turn | None:
    """Takes a discount off the bill; None where it would leave parts of a cent."""
    percents = _percents(bill.cents, [5, 10, 15, 20, 25, 30, 40])
    if not percents:
        return None
    percent, before = rng.choice(percents), bill.text
    off = bill.cents * percent // 100
    bill.cents -= off
    bill.formula = f"({bill.formula}) * (100 - {percent}) / 100"
    bill.name = f"the price after {percent}% off"
    return Turn(
        question=rng.choice(
            [
                f"The shop gives {percent}% off today. What do I pay then?",
                f"I have a voucher for {percent}% off all of it. What is the new price?",
                f"What if everything is {percent}% off?",
            ]
        ),
        plan=rng.choice(
            [
                f"The amount so far is {before}. A discount of {percent}% means that I take "
                f"{percent} hundredths of it away.",
                f"{percent}% off {before}. First one percent, then {percent} of those, then "
                "subtract.",
            ]
        ),
        work=f"{before} * {percent} / 100 = {dollars(off)} is the discount. {before} - "
        f"{dollars(off)} = {bill.text}.",
        check=f"The other way: 100 - {percent} = {100 - percent} percent is left to pay, and "
        f"{before} * {100 - percent} / 100 = {bill.text}. Both ways agree.",
        reply=rng.choice(
            [
                f"You pay ${bill.text}. The discount is ${dollars(off)}, which is {percent}% of "
                f"${before}.",
                f"{percent}% of ${before} is ${dollars(off)}, so ${bill.text} is left to pay.",
            ]
        ),
        value=bill.text,
        formula=bill.formula,
        label=bill.name,
        shown=f"${bill.text}",
        rounds=((calculator(f"{before} * (100 - {percent}) / 100", bill.text),),),
    )


def tax(rng: Random, bill: Bill) -> Turn | None:
    """Adds tax to the bill; None where it would leave parts of a cent."""
    percents = _percents(bill.cents, [4, 5, 6, 8, 10, 12, 20])
    if not percents:
        return None
    percent, before = rng.choice(percents), bill.text
    tax = bill.cents * percent // 100
    bill.cents += tax
    bill.formula = f"({bill.formula}) * (100 + {percent}) / 100"
    bill.name = "the price with tax"
    return Turn(
        question=rng.choice(
            [
                f"There is also {percent}% sales tax on that. How much is it with tax?",
                f"Now add {percent}% tax, please.",
            ]
        ),
        plan=f"Tax of {percent}% comes on top of the {before} that we had, so I work out "
        f"{percent} percent and add it.",
        work=f"{before} * {percent} / 100 = {dollars(tax)}. {before} + {dollars(tax)} = "
        f"{bill.text}.",
        check=f"100 + {percent} = {100 + percent}, and {before} * {100 + percent} / 100 = "
        f"{bill.text}, the same.",
        reply=rng.choice(
            [
                f"With tax it is ${bill.text}; the tax itself is ${dollars(tax)}.",
                f"The tax is ${dollars(tax)}, which brings ${before} up to ${bill.text}.",
            ]
        ),
        value=bill.text,
        formula=bill.formula,
        label=bill.name,
        shown=f"${bill.text}",
        rounds=((calculator(f"{before} * (100 + {percent}) / 100", bill.text),),),
    )


def _percents(cents: int, choices: list[int]) -> list[int]:
    """Returns the percentages that leave whole cents."""
    return [percent for percent in choices if cents * percent % 100 == 0]


def change(rng: Random, bill: Bill) -> Turn:
    """Asks what is left of a note after paying the bill."""
    paid = next(note for note in (20, 50, 100, 200, 500, 1000) if 100 * note > bill.cents)
    back = dollars(100 * paid - bill.cents)
    whole = bill.cents // 100 + 1
    to_whole = dollars(100 * whole - bill.cents)
    return Turn(
        question=rng.choice(
            [
                f"If I hand over ${paid} at the till, how much do I get back?",
                f"I have ${paid} with me. How much is left after paying the bill?",
            ]
        ),
        plan=f"This is {paid} minus the {bill.text} from before. Counting up from the price is "
        "the easy way.",
        work=f"From {bill.text} up to {whole}: {whole} - {bill.text} = {to_whole}. From {whole} "
        f"up to {paid}: {paid} - {whole} = {paid - whole}. Together {to_whole} + {paid - whole} = "
        f"{back}.",
        check=f"{bill.text} + {back} = {paid}, so it fits.",
        reply=rng.choice(
            [
                f"You keep ${back}. Count up from ${bill.text} to ${whole}, and from there to "
                f"${paid}.",
                f"${back} is left, because ${paid} minus ${bill.text} is ${back}.",
            ]
        ),
        value=back,
        formula=f"{paid} - ({bill.formula})",
        label=f"what is left of the ${paid}",
        shown=f"${back}",
        rounds=((calculator(f"{paid} - {bill.text}", back),),),
    )


def share(rng: Random, bill: Bill) -> Turn | None:
    """Asks for equal shares of the bill; None where it does not divide evenly."""
    sizes = [size for size in (2, 3, 4, 5, 6, 8) if bill.cents % size == 0]
    if not sizes:
        return None
    size = rng.choice(sizes)
    each = dollars(bill.cents // size)
    return Turn(
        question=rng.choice(
            [
                f"We are {size} people and share the bill equally. What does each of us pay?",
                f"What is each person's part if {size} of us split the bill?",
            ]
        ),
        plan=f"An equal share of {bill.text} for {size} people is a division. I check that it "
        "comes out in whole cents.",
        work=f"In cents it is {bill.text} * 100 = {bill.cents}. {bill.cents} / {size} = "
        f"{bill.cents // size}, with nothing left over. In dollars: {bill.cents // size} / 100 = "
        f"{each}.",
        check=f"{size} shares: {each} * {size} = {bill.text}. Good.",
        reply=rng.choice(
            [
                f"Each of you pays ${each}. It divides evenly, so nobody has to pay an extra cent.",
                f"Split {size} ways, ${bill.text} is ${each} per person.",
            ]
        ),
        value=each,
        formula=f"({bill.formula}) / {size}",
        label="each person's share",
        shown=f"${each}",
        rounds=((calculator(f"{bill.text} / {size}", each),),),
    )


def months(rng: Random, bill: Bill) -> Turn:
    """Asks for the sum of the same bill, paid several times."""
    count, unit = rng.choice(
        [(3, "weeks"), (4, "weeks"), (6, "months"), (7, "weeks"), (9, "months")]
    )
    total = dollars(bill.cents * count)
    return Turn(
        question=rng.choice(
            [
                f"Suppose I pay the same bill every {unit[:-1]} for {count} {unit}. What does it "
                "add up to?",
                f"And how much is it if I buy exactly this list once a {unit[:-1]} for {count} "
                f"{unit}?",
            ]
        ),
        plan=f"The same {bill.text} comes {count} times, so I multiply. Dollars and cents apart "
        "is easiest in the head.",
        work=money_product(bill.cents, count),
        check=f"Back again: {total} / {count} = {bill.text}.",
        reply=rng.choice(
            [
                f"Over {count} {unit} that is ${total}, {count} times ${bill.text}.",
                f"It adds up to ${total} in {count} {unit}.",
            ]
        ),
        value=total,
        formula=f"({bill.formula}) * {count}",
        label=f"the sum over {count} {unit}",
        shown=f"${total}",
        rounds=((calculator(f"{bill.text} * {count}", total),),),
    )
