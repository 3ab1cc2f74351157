"""Weekly savings towards a price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

from flexmask.demo.calendar_steps import walk, write
from flexmask.demo.steps import division, product
from flexmask.demo.tools import add_days, calculator
from flexmask.demo.turn import Turn, plural


@dataclass(frozen=True, slots=True)
class _Plan:
    """Weekly savings towards a price, in dollars."""

    start: int
    weekly: int
    goal: int
    thing: str

    @property
    def missing(self) -> int:
        """What is still missing today."""
        return self.goal - self.start

    @property
    def weeks(self) -> int:
        """The weeks until nothing is missing."""
        return -(-self.missing // self.weekly)

    @property
    def formula(self) -> str:
        """The weeks, in the student's numbers."""
        return f"ceil(({self.goal} - {self.start}) / {self.weekly})"


def savings(rng: Random) -> Iterator[Turn]:
    """Yields how long a goal takes, then when that is and what is left."""
    thing = rng.choice(["bicycle", "guitar", "tablet", "telescope", "camera", "skateboard"])
    plan = _Plan(5 * rng.randint(4, 24), rng.randint(12, 32), 10 * rng.randint(22, 48), thing)
    yield _weeks(rng, plan)
    more = [_when, _rest, _faster, _after]
    for index in sorted(rng.sample(range(len(more)), rng.randint(2, 4))):
        yield more[index](rng, plan)


def _weeks(rng: Random, plan: _Plan) -> Turn:
    full, rest = divmod(plan.missing, plan.weekly)
    last = f"The rest needs one more week: {full} + 1 = {full + 1}." if rest else "Nothing is left."
    before = plan.start + (plan.weeks - 1) * plan.weekly
    return Turn(
        question=rng.choice(
            [
                f"I have ${plan.start} and save ${plan.weekly} a week. A {plan.thing} costs "
                f"${plan.goal}. How many weeks until I can buy it?",
                f"I want a {plan.thing} for ${plan.goal}. I already have ${plan.start}, and I can "
                f"put aside ${plan.weekly} every week. How many weeks do I need?",
            ]
        ),
        plan="First what is still missing, then how many weeks of saving cover it. A started "
        "week counts as a whole one.",
        work=f"{plan.goal} - {plan.start} = {plan.missing} is missing. "
        f"{division(plan.missing, plan.weekly)} {last}",
        check=f"After {plan.weeks - 1} weeks: {plan.start} + {plan.weeks - 1} * {plan.weekly} = "
        f"{before}, not enough. After {plan.weeks}: {plan.start} + {plan.weeks} * {plan.weekly} = "
        f"{before + plan.weekly}, enough.",
        reply=f"You need {plural(plan.weeks, 'week')}: ${plan.missing} is missing, and each week "
        f"brings ${plan.weekly}.",
        value=str(plan.weeks),
        formula=plan.formula,
        label=f"the time you save for the {plan.thing}",
        shown=plural(plan.weeks, "week"),
    )


def _when(rng: Random, plan: _Plan) -> Turn:
    start = date(rng.choice([2024, 2025, 2026]), 1, 1) + timedelta(rng.randrange(300))
    days = 7 * plan.weeks
    end = start + timedelta(days)
    return Turn(
        question=f"If the first week begins on {write(start)}, on which date are the {plan.weeks} "
        "weeks over?",
        plan=f"{plan.weeks} weeks, and each has 7 days. I go that far from {write(start)}.",
        work=f"{plan.weeks} * 7 = {days} days. {walk(start, days)}",
        check=f"{days} / 7 = {plan.weeks} weeks exactly, so it must fall on the same weekday as "
        "the start.",
        reply=f"The {plan.weeks} weeks are over on {write(end)}.",
        value=write(end),
        formula=f'plus(date("{write(start)}"), 7 * {plan.formula})',
        label=f"the date for the {plan.thing}",
        rounds=((calculator(f"{plan.weeks} * 7", str(days)),), (add_days(start, days),)),
    )


def _rest(rng: Random, plan: _Plan) -> Turn:
    saved = plan.weeks * plan.weekly
    left = plan.start + saved - plan.goal
    return Turn(
        question=f"How many dollars do I have left right after buying the {plan.thing}?",
        plan=f"After {plan.weeks} weeks I add the savings to the {plan.start} from the beginning "
        f"and take away the price of {plan.goal}.",
        work=f"{product(plan.weekly, plan.weeks)} {plan.start} + {saved} = {plan.start + saved}. "
        f"{plan.start + saved} - {plan.goal} = {left}.",
        check=f"It should be less than one week's {plan.weekly}, or the week before had been "
        f"enough: {left} is.",
        reply=f"You have ${left} left: ${plan.start + saved} saved, minus ${plan.goal}.",
        value=str(left),
        formula=f"{plan.start} + {plan.formula} * {plan.weekly} - {plan.goal}",
        label="the money left after buying",
        shown=f"${left}",
        rounds=(
            (calculator(f"{plan.start} + {plan.weeks} * {plan.weekly} - {plan.goal}", str(left)),),
        ),
    )


def _faster(rng: Random, plan: _Plan) -> Turn:
    extra = rng.randint(2, 9)
    weekly = plan.weekly + extra
    full, rest = divmod(plan.missing, weekly)
    weeks = full + bool(rest)
    last = f"With the started week: {full} + 1 = {weeks}." if rest else "It fits exactly."
    return Turn(
        question=f"And if I save ${extra} more each week, how many weeks is it then?",
        plan=f"The missing {plan.missing} stay the same, only the weekly amount grows by {extra}.",
        work=f"{plan.weekly} + {extra} = {weekly}. {division(plan.missing, weekly)} {last}",
        check=f"{weeks} * {weekly} = {weeks * weekly} covers {plan.missing}. Before it was "
        f"{plan.weeks}, and saving more cannot take longer.",
        reply=f"With ${weekly} a week it is {plural(weeks, 'week')}, compared with {plan.weeks} "
        "before.",
        value=str(weeks),
        formula=f"ceil(({plan.goal} - {plan.start}) / ({plan.weekly} + {extra}))",
        label="the time with the higher savings",
        shown=plural(weeks, "week"),
    )


def _after(rng: Random, plan: _Plan) -> Turn:
    weeks = rng.randint(2, plan.weeks - 1) if plan.weeks > 3 else 2
    saved = plan.start + weeks * plan.weekly
    return Turn(
        question=f"How much do I have after {weeks} weeks at ${plan.weekly} a week?",
        plan=f"Only the first {weeks} weeks count here, on top of the {plan.start} I began with.",
        work=f"{product(plan.weekly, weeks)} {plan.start} + {weeks * plan.weekly} = {saved}.",
        check=f"Then {plan.goal} - {saved} = {plan.goal - saved} is still missing, "
        + ("so it is not enough yet." if saved < plan.goal else "so it is enough already."),
        reply=f"After {weeks} weeks you have ${saved}, of which ${weeks * plan.weekly} are new "
        "savings.",
        value=str(saved),
        formula=f"{plan.start} + {weeks} * {plan.weekly}",
        label=f"the money after {weeks} weeks",
        shown=f"${saved}",
        rounds=((calculator(f"{plan.start} + {weeks} * {plan.weekly}", str(saved)),),),
    )
