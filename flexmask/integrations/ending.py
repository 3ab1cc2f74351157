"""How a run of another framework ends where flexmask refuses something."""

from __future__ import annotations

import sys
from functools import cache
from types import TracebackType

from flexmask.errors import FlexmaskError


@cache
def end_in_one_line() -> None:
    """Have this process end with what flexmask refuses and why, without a traceback."""
    show_traceback = sys.excepthook

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, FlexmaskError):
            print(f"flexmask: error: {error}", file=sys.stderr)
        else:
            show_traceback(kind, error, traceback)

    sys.excepthook = show
