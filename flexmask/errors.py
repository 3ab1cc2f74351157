"""The errors that flexmask raises for its callers, and what it announces.

Every message says where, which rule, which value, and what to do about it.
"""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from textwrap import shorten


class FlexmaskError(ValueError):
    """An input that flexmask cannot use exactly; the base of all errors raised on purpose."""


class DataError(FlexmaskError):
    """A conversation, sample or data file that is not in an accepted form."""


class TemplateError(FlexmaskError):
    """A chat template that cannot be rendered into exact samples."""


class LeftOutError(FlexmaskError):
    """A conversation that is left out because the caller asked for it."""


class MaskError(FlexmaskError):
    """A tree, segment list or mask that breaks a rule, or tensors that do not fit it."""


class UnsupportedModelError(FlexmaskError):
    """A model, backend or setting for which single-pass training would not be exact."""


def pluralize(number: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, in the singular for one; `plural` where that is not `noun` + "s".

    >>> pluralize(1, "bad line"), pluralize(1200, "bad line"), pluralize(2, "batch", "batches")
    ('1 bad line', '1,200 bad lines', '2 batches')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def did_you_mean(name: str, known: Iterable[str], mark: str = "") -> str:
    """What is asked of a name that is not known, if anything; `mark` goes before the answer.

    >>> did_you_mean("max_token", ["max_tokens", "backend"], "--")
    ' (did you mean --max_tokens?)'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {mark}{close[0]}?)" if close else ""


def first_of(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first lines of a listing, and how many more it has.

    >>> first_of(["a", "b", "c", "d"], most=2)
    ['a', 'b', 'and 2 more']
    """
    more = len(lines) - most
    return [*lines[:most], *([f"and {more:,} more"] if more > 0 else [])]


def one_line(error: BaseException) -> str:
    """What an error of another library says, cut if long; its type where it says nothing."""
    return shorten(str(error), 400, placeholder=" ...") or type(error).__name__


@cache
def announce_once(text: str) -> None:
    """Warn, once a process for every text."""
    warnings.warn(text, stacklevel=2)


def need_packages(what: str, *names: str) -> None:
    """Raise DataError, which says how to install them, unless these packages are there."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise DataError(
            f"{what} needs {' and '.join(missing)}, not installed here; pip install "
            f"{' '.join(missing)}"
        )
