"""Steps along the calendar: each function returns them as a few sentences."""

from __future__ import annotations

from datetime import date, timedelta


def write(day: date) -> str:
    """Returns a date in words: "March 5, 2025"."""
    return f"{day:%B} {day.day}, {day.year}"


def month_length(day: date) -> int:
    """Returns the number of days in the month of a date."""
    return (_next_month(day) - timedelta(1)).day


def _next_month(day: date) -> date:
    return (day.replace(day=28) + timedelta(4)).replace(day=1)


def walk(start: date, days: int) -> str:
    """Returns the steps to the date some days after `start`, month by month."""
    month, at, lines = start.replace(day=1), start.day, []
    while at + days > month_length(month):
        length = month_length(month)
        left = length - at
        rest = f"{days} - {left} = {days - left} remain."
        has = f"{month:%B %Y} has {length} days"
        lines.append(
            f"{has}, so {length} - {at} = {left} are left in it; {rest}" if at else f"{has}; {rest}"
        )
        month, at, days = _next_month(month), 0, days - left
    if at:
        return f"{at} + {days} = {at + days}, which is still in {month:%B}."
    return " ".join(lines) + f" So it is {write(month.replace(day=days))}."


def walk_back(end: date, days: int) -> str:
    """Returns the steps to the date some days before `end`, month by month."""
    lines, at, month = [], end.day, end
    while days >= at:
        lines.append(f"{at} days back is the end of the month before; {days} - {at} = {days - at}.")
        days -= at
        month = month.replace(day=1) - timedelta(1)
        at = month.day
        lines.append(f"{month:%B %Y} has {at} days.")
    return " ".join([*lines, f"{at} - {days} = {at - days}, so it is {month:%B} {at - days}."])


def count(start: date, end: date) -> str:
    """Returns the steps of the days from `start` to the later `end`, month by month."""
    if (start.year, start.month) == (end.year, end.month):
        return f"Both are in {start:%B}: {end.day} - {start.day} = {(end - start).days}."
    length, month = month_length(start), _next_month(start)
    parts = [length - start.day]
    lines = [
        f"{start:%B %Y} has {length} days, so {length} - {start.day} = {parts[0]} are left in it."
    ]
    while (month.year, month.month) != (end.year, end.month):
        parts.append(month_length(month))
        lines.append(f"{month:%B %Y} has {parts[-1]} days.")
        month = _next_month(month)
    parts.append(end.day)
    lines.append(f"Then {end.day} in {end:%B}. {' + '.join(map(str, parts))} = {sum(parts)}.")
    return " ".join(lines)
