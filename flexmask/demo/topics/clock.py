"""Clock times: when a plan ends, with breaks and delays, on a 24-hour clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from flexmask.demo.steps import product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn, plural

_PLANS = [
    ("The workshop", "sessions"),
    ("My music class", "lessons"),
    ("The swimming course", "rounds"),
    ("The school morning", "periods"),
    ("Our reading day", "chapters"),
]


@dataclass(slots=True)
class _Time:
    """The time that the conversation has arrived at.

    Attributes:
        minutes: minutes after midnight.
        formula: the same in the student's words.
    """

    minutes: int
    formula: str

    @property
    def text(self) -> str:
        """The time as text, "9:40"."""
        return write(self.minutes)


def write(minutes: int) -> str:
    """Returns minutes after midnight as a clock time: 580 as "9:40"."""
    return f"{minutes // 60}:{minutes % 60:02d}"


def _to_minutes(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    return f"{write(minutes)} is {hours} * 60 + {rest} = {minutes} minutes after midnight."


def _to_clock(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    return (
        f"{hours} * 60 = {hours * 60} and {minutes} - {hours * 60} = {rest}, so it is "
        f"{write(minutes)}."
    )


def plans(rng: Random) -> Iterator[Turn]:
    """Yields a plan with a start time and equal parts, then questions on its end."""
    name, parts = rng.choice(_PLANS)
    number, length = rng.randint(2, 5), rng.choice([25, 30, 35, 40, 45, 50, 55])
    start = 60 * rng.randint(7, 10) + 5 * rng.randrange(12)
    now = _Time(start, f'minutes("{write(start)}")')
    yield _end(rng, now, name, parts, number, length)
    if rng.random() < 0.7:
        yield _breaks(rng, now, number, parts)
    for follow_up in rng.sample([_way_home, _until, _late, _tasks], rng.randint(1, 4)):
        yield follow_up(rng, now)


def _end(rng: Random, now: _Time, name: str, parts: str, number: int, length: int) -> Turn:
    start, total = now.minutes, number * length
    now.minutes, now.formula = start + total, f"{now.formula} + {number} * {length}"
    return Turn(
        question=rng.choice(
            [
                f"{name} starts at {write(start)} and has {number} {parts} of {length} minutes. "
                "When does it end?",
                f"{name} has {number} {parts}, each {length} minutes long, and begins at "
                f"{write(start)}. What time is it over?",
            ]
        ),
        plan=f"First the length of all the {parts}, then I add it to the start. Minutes after "
        "midnight make the adding safe.",
        work=f"{number} * {length} = {total} minutes. {_to_minutes(start)} {start} + {total} = "
        f"{now.minutes}.",
        check=f"{_to_clock(now.minutes)} From the end back: {now.minutes} - {start} = {total} "
        f"minutes, and {total} / {number} = {length}.",
        reply=rng.choice(
            [
                f"It ends at {now.text}: the {parts} take {total} minutes in all.",
                f"It is over at {now.text}, {total} minutes after {write(start)}.",
            ]
        ),
        value=now.text,
        formula=f"clock({now.formula})",
        label="the end of the plan",
        rounds=(
            (
                calculator(
                    f"{start // 60} * 60 + {start % 60} + {number} * {length}", str(now.minutes)
                ),
            ),
        ),
    )


def _breaks(rng: Random, now: _Time, number: int, parts: str) -> Turn:
    before, pause = now.minutes, rng.choice([5, 10, 15, 20])
    gaps = number - 1
    now.minutes, now.formula = before + gaps * pause, f"{now.formula} + ({number} - 1) * {pause}"
    return Turn(
        question=rng.choice(
            [
                f"I forgot: there is a break of {pause} minutes between the {parts}. When does it "
                "end now?",
                f"And with {pause} minutes of break between one and the next?",
            ]
        ),
        plan=f"Breaks lie only between the {parts}, so {number} {parts} have one break fewer. "
        f"They push the end back from {write(before)}.",
        work=f"{number} - 1 = {gaps}. {gaps} * {pause} = {gaps * pause} minutes more. "
        f"{_to_minutes(before)} {before} + {gaps * pause} = {now.minutes}.",
        check=f"{_to_clock(now.minutes)} A common slip is to count {number} breaks, but nobody "
        f"needs one after the last of the {parts}.",
        reply=f"With {plural(gaps, 'break')} it ends at {now.text}, {gaps * pause} minutes later "
        "than without.",
        value=now.text,
        formula=f"clock({now.formula})",
        label="the end with breaks",
        rounds=((calculator(f"{before} + ({number} - 1) * {pause}", str(now.minutes)),),),
    )


def _way_home(rng: Random, now: _Time) -> Turn:
    before, way = now.minutes, rng.randint(12, 70)
    now.minutes, now.formula = before + way, f"{now.formula} + {way}"
    return Turn(
        question=rng.choice(
            [
                f"Then it takes me {way} minutes to get home. When am I there?",
                f"After that I need {way} minutes for the way back. What time is it then?",
            ]
        ),
        plan=f"We are at {write(before)}, and {way} minutes come on top. I fill up the hour first "
        "if it goes past it.",
        work=_fill_hour(before, way),
        check=f"In minutes after midnight: {before} + {way} = {now.minutes}. "
        f"{_to_clock(now.minutes)}",
        reply=rng.choice(
            [
                f"You are home at {now.text}, {way} minutes after {write(before)}.",
                f"{write(before)} plus {way} minutes is {now.text}.",
            ]
        ),
        value=now.text,
        formula=f"clock({now.formula})",
        label="the time you are home",
        rounds=((calculator(f"{before} + {way}", str(now.minutes)),),),
    )


def _fill_hour(minutes: int, more: int) -> str:
    past = minutes % 60
    if past + more < 60:
        return f"{past} + {more} = {past + more}, which is below 60, so the hour stays the same."
    to_hour = 60 - past
    rest = more - to_hour
    line = (
        f"60 - {past} = {to_hour} minutes lead to {write(minutes + to_hour)}. {more} - {to_hour} "
        f"= {rest} are left"
    )
    if rest >= 60:
        return f"{line}; {rest} - 60 = {rest - 60}, so an hour more and {rest - 60} minutes."
    return f"{line}, so it is {write(minutes + more)}."


def _until(rng: Random, now: _Time) -> Turn:
    gap = rng.randint(65, 170)
    goal = now.minutes + gap
    hours, rest = divmod(gap, 60)
    return Turn(
        question=rng.choice(
            [
                f"I want to call my aunt at {write(goal)}. How many minutes do I have until then?",
                f"How many minutes are there from then until {write(goal)}?",
            ]
        ),
        plan=f"From {now.text} to {write(goal)}. Both times in minutes after midnight, and the "
        "difference is the answer.",
        work=f"{_to_minutes(now.minutes)} {_to_minutes(goal)} {goal} - {now.minutes} = {gap}.",
        check=f"{hours} * 60 + {rest} = {gap}, that is {plural(hours, 'hour')} and "
        f"{plural(rest, 'minute')}, which looks right on a clock.",
        reply=f"From {now.text} to {write(goal)} it is {gap} minutes, or {plural(hours, 'hour')} "
        f"and {plural(rest, 'minute')}.",
        value=str(gap),
        formula=f'minutes("{write(goal)}") - ({now.formula})',
        label=f"the wait until {write(goal)}",
        shown=f"{gap} minutes",
        rounds=((calculator(f"{goal} - {now.minutes}", str(gap)),),),
    )


def _late(rng: Random, now: _Time) -> Turn:
    before, delay = now.minutes, rng.choice([8, 12, 18, 20, 25, 35, 48])
    now.minutes, now.formula = before + delay, f"{now.formula} + {delay}"
    return Turn(
        question=rng.choice(
            [
                f"Everything runs {delay} minutes late. What time does that make it?",
                f"What if there is a delay of {delay} minutes?",
            ]
        ),
        plan=f"A delay moves {write(before)} by {delay} minutes; nothing else changes.",
        work=f"{_fill_hour(before, delay)} In minutes after midnight: {before} + {delay} = "
        f"{now.minutes}.",
        check=f"{_to_clock(now.minutes)} Going back by the delay: {now.minutes} - {delay} = "
        f"{before}, which is {write(before)}.",
        reply=f"It moves from {write(before)} to {now.text}.",
        value=now.text,
        formula=f"clock({now.formula})",
        label="the time with the delay",
        rounds=((calculator(f"{before} + {delay}", str(now.minutes)),),),
    )


def _tasks(rng: Random, now: _Time) -> Turn:
    number, each = rng.randint(2, 4), rng.choice([15, 20, 25, 30])
    before, total = now.minutes, number * each
    now.minutes, now.formula = before + total, f"{now.formula} + {number} * {each}"
    return Turn(
        question=f"After that I have {number} tasks of {each} minutes each. When am I done with "
        "all of them?",
        plan=f"The tasks take {number} times {each} minutes, and they start at {write(before)}.",
        work=f"{product(number, each)} {_to_minutes(before)} {before} + {total} = {now.minutes}.",
        check=f"{_to_clock(now.minutes)} Backwards: {now.minutes} - {total} = {before}, which is "
        f"{write(before)}.",
        reply=f"You are done at {now.text}, since the tasks take {total} minutes together.",
        value=now.text,
        formula=f"clock({now.formula})",
        label="the end of the tasks",
        rounds=(
            (calculator(f"{number} * {each}", str(total)),),
            (calculator(f"{before} + {total}", str(now.minutes)),),
        ),
    )
