"""Values as JSON has them: parsed, and held to what can be encoded, written and walked through."""

from __future__ import annotations

import json
import math
from typing import Any

from flexmask.errors import DataError

MAX_DEPTH = 100  # levels; json.dumps, templates and the copies of transformers recurse into values


def parse_json(text: str, what: str) -> Any:
    """Return the value of a JSON text; DataError where it is none, or nested too deep."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} is not JSON ({error.msg}: character {error.pos}): {text[:40]!r}"
        ) from None
    except ValueError as error:  # the digits that Python converts have a limit
        reason = str(error).partition(":")[0]
        raise DataError(f"{what} holds a number that is too long: {reason}") from None
    except RecursionError:
        raise DataError(_too_deep(what)) from None
    check_depth(value, what)
    return value


def check_depth(value: Any, what: str) -> None:
    """Raise DataError where lists and objects are nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return
        level = inner
    raise DataError(_too_deep(what))


def _too_deep(what: str) -> str:
    return f"{what} is nested too deep: lists and objects may go {MAX_DEPTH} levels down"


def read_text(value: Any, what: str) -> str:
    """Return `value` if it is text that can be encoded; None counts as no text.

    Args:
        value: the field as found in the data.
        what: the field's name, for errors: "message 3: content".
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{what} holds half of a surrogate pair; write it as whole characters")
    return value


def check_values(value: Any, what: str) -> None:
    """Raise where a text inside `value` cannot be encoded, or a number is none of JSON's."""
    if isinstance(value, str):
        read_text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} must hold what JSON can write, got {value}")
    elif isinstance(value, dict):
        check_values([*value.keys(), *value.values()], what)
    elif isinstance(value, list):
        for item in value:
            check_values(item, what)


def without_nulls(value: Any) -> Any:
    """The same value without keys that are None, at any depth: rows of Arrow all have all keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
