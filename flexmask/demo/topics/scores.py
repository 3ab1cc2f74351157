"""Test scores: percentages and means."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from flexmask.demo.tools import calculator
from flexmask.demo.turn import NAMES, Turn, decimal, plural


def scores(rng: Random) -> Iterator[Turn]:
    """Yields a percentage of a test, then what other scores would mean."""
    total = rng.choice([20, 25, 40, 50, 80])
    right = rng.randint(total // 2, total - 3)
    name = rng.choice(NAMES)
    yield _percent(rng, right, total, name)
    more = [_wrong(right, total, name), _needed(rng, right, total, name), _mean(rng, right, total)]
    yield from rng.sample(more, rng.randint(1, 3))


def _percent(rng: Random, right: int, total: int, name: str) -> Turn:
    percent = decimal(100 * right, total)
    return Turn(
        question=rng.choice(
            [
                f"{name} got {right} of {total} points in a test. How many percent is that?",
                f"What percentage is {right} points out of {total}? That is {name}'s test.",
            ]
        ),
        plan=f"A percentage is the part for a whole of 100. So I take {right} out of {total} and "
        "scale it up.",
        work=f"{right} * 100 = {right * 100}. {right * 100} / {total} = {percent}.",
        check=f"One point is worth 100 / {total} = {decimal(100, total)} percent, and "
        f"{decimal(100, total)} * {right} = {percent}. The same.",
        reply=f"{name} has {percent}%: each point is worth {decimal(100, total)}%.",
        value=percent,
        formula=f"{right} * 100 / {total}",
        label=f"the percentage for {name}",
        shown=f"{percent}%",
        rounds=((calculator(f"{right} * 100 / {total}", percent),),),
    )


def _wrong(right: int, total: int, name: str) -> Turn:
    share = decimal(100 * (total - right), total)
    return Turn(
        question=f"How many percent did {name} lose?",
        plan="What was lost and what was reached make 100 percent together, so I only need to "
        "subtract the percentage from before.",
        work=f"100 - {decimal(100 * right, total)} = {share}.",
        check=f"From the points: {total} - {right} = {total - right} lost, and {total - right} * "
        f"100 / {total} = {share}.",
        reply=f"{name} lost {share}%, which is {plural(total - right, 'point')}.",
        value=share,
        formula=f"100 - {right} * 100 / {total}",
        label="the lost percentage",
        shown=f"{share}%",
        rounds=((calculator(f"100 - {decimal(100 * right, total)}", share),),),
    )


def _needed(rng: Random, right: int, total: int, name: str) -> Turn:
    goal = rng.choice(
        [p for p in (80, 90, 95, 100) if p * total % 100 == 0 and p * total > 100 * right] or [100]
    )
    need = goal * total // 100
    return Turn(
        question=f"How many more points would {name} have needed for {goal}%?",
        plan=f"First the points for {goal} percent of {total}, then the distance from {right}.",
        work=f"{total} * {goal} / 100 = {need}. {need} - {right} = {need - right}.",
        check=f"{right} + {need - right} = {need}, and {need} * 100 / {total} = {goal}. Right.",
        reply=f"{goal}% is {need} points, so {plural(need - right, 'more point')} would have done "
        "it.",
        value=str(need - right),
        formula=f"{total} * {goal} / 100 - {right}",
        label=f"the points missing for {goal}%",
        rounds=((calculator(f"{total} * {goal} / 100 - {right}", str(need - right)),),),
    )


def _mean(rng: Random, right: int, total: int) -> Turn:
    others = [rng.randint(total // 3, total - 3) for _ in range(3)]
    others[-1] += -(right + sum(others)) % 4
    everyone = [right, *others]
    mean = sum(everyone) // 4
    return Turn(
        question=f"Three classmates got {others[0]}, {others[1]} and {others[2]} points. What is "
        "the mean of all four?",
        plan=f"All four means that the {right} points from before count too. Add them and divide "
        "by 4.",
        work=f"{' + '.join(map(str, everyone))} = {sum(everyone)}. {sum(everyone)} / 4 = {mean}.",
        check="The distances to the mean have to cancel out: "
        + ", ".join(f"{points} - {mean} = {points - mean}" for points in everyone)
        + ". They add up to nothing.",
        reply=f"The mean of the four is {mean} points: together they have {sum(everyone)}, "
        "divided by 4.",
        value=str(mean),
        formula=f"({right} + {' + '.join(map(str, others))}) / 4",
        label="the mean of the four",
        shown=f"{mean} points",
        rounds=((calculator(f"({' + '.join(map(str, everyone))}) / 4", str(mean)),),),
    )
