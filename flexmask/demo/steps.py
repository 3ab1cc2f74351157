"""Arithmetic as a tutor does it on paper: each function returns its steps as a sentence or two."""

from __future__ import annotations

from flexmask.demo.turn import dollars


def product(a: int, b: int) -> str:
    """Returns the steps of a * b, split at the tens of b where that helps."""
    tens = b - b % 10
    if b <= 12 or b == tens or a <= 10:
        return f"{a} * {b} = {a * b}."
    return (
        f"I split {b} into {tens} and {b - tens}: {a} * {tens} = {a * tens} and {a} * {b - tens} "
        f"= {a * (b - tens)}. Together {a * tens} + {a * (b - tens)} = {a * b}."
    )


def money_product(cents: int, count: int) -> str:
    """Returns the steps of an amount times a count, dollars and cents apart."""
    whole, part = cents - cents % 100, cents % 100
    if not part or not whole:
        return f"{dollars(cents)} * {count} = {dollars(cents * count)}."
    return (
        f"Dollars: {whole // 100} * {count} = {whole // 100 * count}. Cents: {dollars(part)} * "
        f"{count} = {dollars(part * count)}. Together {whole // 100 * count} + "
        f"{dollars(part * count)} = {dollars(cents * count)}."
    )


def division(a: int, b: int) -> str:
    """Returns the steps of a / b as the largest multiple of b that fits, and the rest."""
    quotient, rest = divmod(a, b)
    end = (
        f"so {b} goes in exactly {quotient} times." if not rest else f"so the remainder is {rest}."
    )
    return f"{b} * {quotient} = {b * quotient} and {a} - {b * quotient} = {rest}, {end}"


def euclid(a: int, b: int) -> str:
    """Returns the steps of Euclid's algorithm for a > b > 0."""
    lines = []
    while b:
        quotient, rest = divmod(a, b)
        lines.append(f"{quotient} * {b} + {rest} = {a}, remainder {rest}.")
        a, b = b, rest
    return " ".join(lines) + f" The last remainder that is not zero is {a}."


def half(number: int) -> str:
    """Returns half of a whole number as text."""
    return f"{number // 2}{'.5' if number % 2 else ''}"
