"""Journeys at a constant speed: ways, times and fuel."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from flexmask.demo.steps import product
from flexmask.demo.tools import calculator
from flexmask.demo.turn import Turn, decimal


def journey(rng: Random) -> Iterator[Turn]:
    """Yields a distance from speed and time, then other times and speeds for it."""
    speed, hours = rng.choice([40, 48, 60, 72, 80, 84, 90, 96, 120]), rng.randint(2, 6)
    vehicle = rng.choice(["train", "bus", "car", "truck"])
    yield _distance(rng, speed, hours, vehicle)
    more = [_other_speed, _fuel, _minutes, _return]
    for follow_up in rng.sample(more, rng.randint(2, 4)):
        yield follow_up(rng, speed, hours, vehicle)


def _distance(rng: Random, speed: int, hours: int, vehicle: str) -> Turn:
    way = speed * hours
    return Turn(
        question=rng.choice(
            [
                f"A {vehicle} goes {speed} km/h for {hours} hours. How far does it get?",
                f"How many kilometers does a {vehicle} cover in {hours} hours at {speed} km/h?",
            ]
        ),
        plan=f"Speed says how far it gets in one hour: {speed} km. For {hours} hours I multiply.",
        work=product(speed, hours),
        check=f"In half of the time it would cover {speed} * {hours} / 2 = {decimal(way, 2)} km, "
        f"and {decimal(way, 2)} * 2 = {way}.",
        reply=f"The {vehicle} covers {way} km, {speed} km in each of the {hours} hours.",
        value=str(way),
        formula=f"{speed} * {hours}",
        label="the distance",
        shown=f"{way} km",
        rounds=((calculator(f"{speed} * {hours}", str(way)),),),
    )


def _other_speed(rng: Random, speed: int, hours: int, vehicle: str) -> Turn:
    way = speed * hours
    other = rng.choice(
        [s for s in (20, 25, 30, 45, 50, 60, 75, 100) if s != speed and way * 20 % s == 0]
    )
    time, minutes = (
        decimal(way * 60, other * 60) if way * 1000 % other == 0 else "",
        way * 60 // other,
    )
    hint = f" As hours that is {way} / {other} = {time}." if time else ""
    return Turn(
        question=f"How many minutes would the same way take at {other} km/h?",
        plan=f"The way is {way} km, as before. Time is way divided by speed, and an hour has 60 "
        "minutes. Multiplying by 60 first keeps the numbers whole.",
        work=f"{product(way, 60)} {way * 60} / {other} = {minutes}.{hint}",
        check=f"{other} km/h for {minutes} minutes: {other} * {minutes} / 60 = {way} km. That "
        "fits.",
        reply=f"At {other} km/h it takes {minutes} minutes for the {way} km.",
        value=str(minutes),
        formula=f"{speed} * {hours} * 60 / {other}",
        label=f"the time at {other} km/h",
        shown=f"{minutes} minutes",
        rounds=((calculator(f"{way} * 60 / {other}", str(minutes)),),),
    )


def _fuel(rng: Random, speed: int, hours: int, vehicle: str) -> Turn:
    way, use = speed * hours, rng.randint(5, 9)
    liters = decimal(way * use, 100)
    return Turn(
        question=f"Suppose it needs {use} liters of fuel per 100 km. How many liters for that way?",
        plan=f"{way} km is {way} hundredths of 100 km. So I multiply by {use} and divide by 100.",
        work=f"{product(way, use)} {way * use} / 100 = {liters}.",
        check=f"For {way - way % 100} km alone it would be {way - way % 100} * {use} / 100 = "
        f"{decimal((way - way % 100) * use, 100)}, and the last {way % 100} km add the rest.",
        reply=f"It needs {liters} liters for the {way} km.",
        value=liters,
        formula=f"{speed} * {hours} * {use} / 100",
        label="the fuel",
        shown=f"{liters} liters",
        rounds=((calculator(f"{way} * {use} / 100", liters),),),
    )


def _minutes(rng: Random, speed: int, hours: int, vehicle: str) -> Turn:
    part = rng.choice([10, 15, 20, 25, 30, 40, 45])
    way = decimal(speed * part, 60) if speed * part * 1000 % 60 == 0 else ""
    if not way:
        part, way = 30, decimal(speed, 2)
    return Turn(
        question=f"And how far does the {vehicle} get in {part} minutes at the first speed?",
        plan=f"The first speed was {speed} km in 60 minutes, and {part} minutes are a part of "
        "that.",
        work=f"{product(speed, part)} {speed * part} / 60 = {way}.",
        check=f"Scaling up, {way} * 60 / {part} = {speed}, the speed again.",
        reply=f"In {part} minutes it covers {way} km.",
        value=way,
        formula=f"{speed} * {part} / 60",
        label=f"the way in {part} minutes",
        shown=f"{way} km",
        rounds=((calculator(f"{speed} * {part} / 60", way),),),
    )


def _return(rng: Random, speed: int, hours: int, vehicle: str) -> Turn:
    way, days = speed * hours, rng.randint(3, 9)
    total = 2 * way * days
    return Turn(
        question=f"It drives there and back on {days} days. How many km are that in all?",
        plan=f"There and back is twice the {way} km, and that happens {days} times.",
        work=f"2 * {way} = {2 * way}. {product(2 * way, days)}",
        check=f"One way only: {way} * {days} = {way * days}, and {way * days} + {way * days} = "
        f"{total}.",
        reply=f"That is {total} km, {days} trips of {2 * way} km.",
        value=str(total),
        formula=f"2 * {speed} * {hours} * {days}",
        label="the distance on all days",
        shown=f"{total} km",
        rounds=((calculator(f"2 * {way} * {days}", str(total)),),),
    )
