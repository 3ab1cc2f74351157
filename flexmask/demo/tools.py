"""The tutor's two tools: their schemas, and calls to them with true results."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

from flexmask.demo.turn import Call


def _schema(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    """Returns a function schema; parameters map a name to its JSON type and description."""
    properties = {
        key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()
    }
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(parameters),
            },
        },
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "calculator": _schema(
        "calculator",
        "Evaluates an arithmetic expression exactly.",
        expression=("string", "Numbers, + - * / % and parentheses."),
    ),
    "add_days": _schema(
        "add_days",
        "Returns the date a number of days after a date, with its weekday.",
        date=("string", "The first date, YYYY-MM-DD."),
        days=("integer", "Days to add; negative to go back."),
    ),
    "days_between": _schema(
        "days_between",
        "Returns the number of days from one date to another.",
        start=("string", "The first date, YYYY-MM-DD."),
        end=("string", "The last date, YYYY-MM-DD."),
    ),
}


def calculator(expression: str, result: str) -> Call:
    """Returns a call of the calculator, its result given as text."""
    return Call("calculator", {"expression": expression}, {"result": result})


def add_days(start: date, days: int) -> Call:
    """Returns a call that finds a date and its weekday."""
    end = start + timedelta(days)
    result = {"date": end.isoformat(), "weekday": end.strftime("%A")}
    return Call("add_days", {"date": start.isoformat(), "days": days}, result)


def days_between(start: date, end: date) -> Call:
    """Returns a call that counts days."""
    arguments = {"start": start.isoformat(), "end": end.isoformat()}
    return Call("days_between", arguments, {"days": (end - start).days})
