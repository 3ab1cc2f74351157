"""How much time a long run has left."""

from __future__ import annotations

import time


class Budget:
    """A number of seconds from now on."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._started = time.perf_counter()

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @property
    def left_s(self) -> float:
        """Seconds until the limit, 0 after it."""
        return max(0.0, self._limit_s - self.spent_s)

    def allows(self, expected_s: float) -> bool:
        """Whether something of `expected_s` seconds would end in time."""
        return self.spent_s + expected_s <= self._limit_s
