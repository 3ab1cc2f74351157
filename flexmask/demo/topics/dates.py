"""Dates: days between them, dates some days on, weekdays, and what is left of a month."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

from flexmask.demo.calendar_steps import count, month_length, walk, walk_back, write
from flexmask.demo.steps import division
from flexmask.demo.tools import add_days, calculator, days_between
from flexmask.demo.turn import Turn, ordinal, plural

_EVENTS = ["school trip", "concert", "dentist visit", "exam", "football match", "workshop"]


@dataclass(slots=True)
class _Day:
    """The day that the conversation has arrived at.

    Attributes:
        day: the date.
        formula: the date in the student's words.
    """

    day: date
    formula: str

    @property
    def text(self) -> str:
        """The date in words."""
        return write(self.day)


def dates(rng: Random) -> Iterator[Turn]:
    """Yields a question about a date and what follows from it."""
    day = date(rng.choice([2023, 2024, 2025, 2026, 2027]), 1, 1) + timedelta(rng.randrange(330))
    now = _Day(day, f'date("{write(day)}")')
    event = rng.choice(_EVENTS)
    yield rng.choice([_until, _days_on])(rng, now, event)
    follow_ups = [_weekday, _weeks_on, _rest_of_month, _day_of_year, _days_back]
    for follow_up in rng.sample(follow_ups, rng.randint(2, 5)):
        yield follow_up(rng, now)


def _until(rng: Random, now: _Day, event: str) -> Turn:
    start, days = now.day, rng.randint(9, 88)
    end = start + timedelta(days)
    formula = f'days({now.formula}, date("{write(end)}"))'
    now.day, now.formula = end, f'date("{write(end)}")'
    weeks, rest = divmod(days, 7)
    return Turn(
        question=rng.choice(
            [
                f"Today is {write(start)} and the {event} is on {write(end)}. How many days is "
                "that?",
                f"How many days are there from {write(start)} to the {event} on {write(end)}?",
            ]
        ),
        plan=rng.choice(
            [
                "I count from the first date to the last one, month by month, and do not count "
                "the first day itself.",
                "Days between two dates: what is left of the first month, whole months, and the "
                "days of the last month.",
            ]
        ),
        work=count(start, end),
        check=f"In weeks: {division(days, 7)} That is {plural(weeks, 'week')} and "
        f"{plural(rest, 'day')}, which looks right.",
        reply=rng.choice(
            [
                f"It is {days} days from {write(start)} to {write(end)}.",
                f"There are {days} days to go, not counting {write(start)} itself.",
            ]
        ),
        value=str(days),
        formula=formula,
        label=f"the time until the {event}",
        shown=f"{days} days",
        rounds=((days_between(start, end),),),
    )


def _days_on(rng: Random, now: _Day, event: str) -> Turn:
    start, days = now.day, rng.randint(12, 95)
    now.day, now.formula = start + timedelta(days), f"plus({now.formula}, {days})"
    return Turn(
        question=rng.choice(
            [
                f"The {event} is {days} days after {write(start)}. Which date is that?",
                f"Today is {write(start)}. What date is the {event} if it is in {days} days?",
            ]
        ),
        plan=f"I have to move {days} days forward from {write(start)}, using up one month after "
        "the other.",
        work=walk(start, days),
        check=f"Counting back to be sure. {count(start, now.day)} That is the {days} we wanted.",
        reply=rng.choice(
            [
                f"The {event} is on {now.text}.",
                f"{days} days after {write(start)} is {now.text}.",
            ]
        ),
        value=now.text,
        formula=now.formula,
        label=f"the date of the {event}",
        rounds=((add_days(start, days),),),
    )


def _weekday(rng: Random, now: _Day) -> Turn:
    known = now.day - timedelta(7 * rng.randint(1, 8) + rng.randint(1, 6))
    days = (now.day - known).days
    weeks, rest = divmod(days, 7)
    moved = f"{known:%A} plus {plural(rest, 'day')} is {now.day:%A}"
    return Turn(
        question=rng.choice(
            [
                f"I know that {write(known)} is a {known:%A}. Which weekday is our date then?",
                f"And which day of the week is it? {write(known)} is a {known:%A}, if that helps.",
            ]
        ),
        plan=f"Our date is {now.text}. I count the days from {write(known)}, and only what is "
        "left after whole weeks moves the weekday.",
        work=f"{count(known, now.day)} {division(days, 7)}",
        check=f"Whole weeks change nothing, and {moved}. Sanity check: {weeks} * 7 + {rest} = "
        f"{days}.",
        reply=rng.choice(
            [
                f"{now.text} is a {now.day:%A}: it is {plural(weeks, 'week')} and "
                f"{plural(rest, 'day')} "
                f"after that {known:%A}.",
                f"It is a {now.day:%A}. Divide the {days} days by 7, and the remainder {rest} "
                "moves the weekday.",
            ]
        ),
        value=f"{now.day:%A}",
        formula=f"weekday({now.formula})",
        label="the weekday",
        rounds=((days_between(known, now.day),), (calculator(f"{days} % 7", str(rest)),)),
    )


def _weeks_on(rng: Random, now: _Day) -> Turn:
    weeks, start = rng.randint(2, 9), now.day
    days = 7 * weeks
    now.day, now.formula = start + timedelta(days), f"plus({now.formula}, {weeks} * 7)"
    return Turn(
        question=rng.choice(
            [
                f"And what date is {weeks} weeks after that date?",
                f"It will happen again {weeks} weeks later. On which date is that?",
                f"Then I have to be back {weeks} weeks after that date. Which date is it?",
            ]
        ),
        plan=f"We were at {write(start)}. {weeks} weeks are {weeks} * 7 = {days} days, so I move "
        "on by that.",
        work=walk(start, days),
        check="Whole weeks keep the weekday, so it must be the same day of the week as before. "
        f"The count back: {count(start, now.day)}",
        reply=rng.choice(
            [
                f"{weeks} weeks are {days} days, so that is {now.text}.",
                f"That is {now.text}, on the same weekday as {write(start)}.",
            ]
        ),
        value=now.text,
        formula=now.formula,
        label="the later date",
        rounds=((calculator(f"{weeks} * 7", str(days)),), (add_days(start, days),)),
    )


def _days_back(rng: Random, now: _Day) -> Turn:
    days, end = rng.randint(5, 40), now.day
    start = end - timedelta(days)
    now.day, now.formula = start, f"plus({now.formula}, -{days})"
    return Turn(
        question=rng.choice(
            [
                f"I want to begin preparing {days} days before that date. When do I begin?",
                f"What is the date {days} days before our date?",
            ]
        ),
        plan=f"This time I go backwards from {write(end)} by {days} days.",
        work=walk_back(end, days),
        check=f"Forwards again from {write(start)}: {walk(start, days)} That is where we came "
        "from.",
        reply=rng.choice(
            [
                f"{days} days before {write(end)} is {write(start)}.",
                f"That is {write(start)}. Going forward {days} days from there leads to "
                f"{write(end)}.",
            ]
        ),
        value=write(start),
        formula=now.formula,
        label="the earlier date",
        rounds=((add_days(end, -days),),),
    )


def _rest_of_month(rng: Random, now: _Day) -> Turn:
    length = month_length(now.day)
    left = length - now.day.day
    leap = ""
    if now.day.month == 2:
        leap = f" {division(now.day.year, 4)} That decides about the leap day."
    return Turn(
        question=rng.choice(
            [
                "How many days of that month are left after it?",
                "How many days does the month still have after that date?",
            ]
        ),
        plan=f"The date we have is {now.text}. I need the length of {now.day:%B} and then the "
        f"days after the {ordinal(now.day.day)}.{leap}",
        work=f"{now.day:%B %Y} has {length} days. {length} - {now.day.day} = {left}.",
        check=f"{now.day.day} + {left} = {length}, the whole month.",
        reply=rng.choice(
            [
                f"{now.day:%B} has {length} days, so {plural(left, 'day')} of it come after the "
                f"{ordinal(now.day.day)}.",
                f"After {now.text} there {'is' if left == 1 else 'are'} still "
                f"{plural(left, 'day')} in that month.",
            ]
        ),
        value=str(left),
        formula=f"month_end({now.formula}) - day({now.formula})",
    )


def _day_of_year(rng: Random, now: _Day) -> Turn:
    day, first = now.day, date(now.day.year, 1, 1)
    number = (day - first).days + 1
    months = [month_length(date(day.year, month, 1)) for month in range(1, day.month)]
    names = [
        f"{date(day.year, month, 1):%B %Y} has {length} days."
        for month, length in enumerate(months, 1)
    ]
    added = f"{' + '.join(map(str, [*months, day.day]))} = {number}." if months else ""
    return Turn(
        question=rng.choice(
            [
                "Which day of the year is it, counting January 1 as day 1?",
                "If January 1 is day 1, what number does that date have in its year?",
            ]
        ),
        plan=f"For {day:%B} {day.day} I add up all the months before it and then the day itself.",
        work=" ".join([*names, added]).strip()
        or "January is the first month, so nothing is added.",
        check=f"From the end: a year of {365 + (month_length(date(day.year, 2, 1)) == 29)} days "
        "has "
        + f"{365 + (month_length(date(day.year, 2, 1)) == 29)} - {number} = "
        + f"{365 + (month_length(date(day.year, 2, 1)) == 29) - number} days left after it.",
        reply=rng.choice(
            [
                f"It is day {number} of {day.year}.",
                f"{now.text} is day number {number} in its year.",
            ]
        ),
        value=str(number),
        formula=f"day_of_year({now.formula})",
        rounds=((days_between(first, day),), (calculator(f"{number - 1} + 1", str(number)),)),
    )
