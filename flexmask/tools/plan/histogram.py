"""A running histogram of whole numbers, of fixed size whatever it counts.

Numbers below 64 have a bin each; above, every octave has 32 bins, so that no bin is wider than 1/32
of its values (the layout of HdrHistogram).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_EXACT = 64  # numbers below have a bin of their own
_PER_OCTAVE = 32
_NUM_OCTAVES = 40


class Histogram:
    """How often whole numbers of at least 0 occurred.

    Attributes:
        count: how many numbers were added.
        total: their sum.
        lowest, highest: the smallest and the largest, 0 while there are none.
    """

    __slots__ = ("_counts", "count", "highest", "lowest", "total")

    def __init__(self) -> None:
        self._counts = np.zeros(_EXACT + _PER_OCTAVE * _NUM_OCTAVES, np.int64)
        self.count = self.total = self.lowest = self.highest = 0

    def add(self, value: int) -> None:
        """Count one number."""
        self.lowest = min(self.lowest, value) if self.count else value
        self.highest = max(self.highest, value)
        self._counts[_bin_of(value)] += 1
        self.count += 1
        self.total += value

    @property
    def mean(self) -> float:
        """The mean, 0 while there are no numbers."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """A number that `share` of the numbers do not exceed: exact below 64, else within 1/32."""
        wanted = share * self.count
        seen = 0
        for _, stop, count in self.bins():
            seen += count
            if seen >= wanted:
                return min(stop - 1, self.highest)
        return self.highest

    def bins(self) -> Iterator[tuple[int, int, int]]:
        """The bins that are not empty, ascending: (first number, one past the last, count)."""
        for index in np.flatnonzero(self._counts).tolist():
            start, stop = _edges(index)
            yield start, stop, int(self._counts[index])

    def to_json(self) -> dict[str, Any]:
        """Its figures and bins as plain data."""
        return {
            "mean": self.mean,
            "lowest": self.lowest,
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "highest": self.highest,
            "bins": [list(bin_) for bin_ in self.bins()],
        }


def _bin_of(value: int) -> int:
    if value < _EXACT:
        return value
    shift = value.bit_length() - _PER_OCTAVE.bit_length()
    return _EXACT + (shift - 1) * _PER_OCTAVE + (value >> shift) - _PER_OCTAVE


def _edges(index: int) -> tuple[int, int]:
    if index < _EXACT:
        return index, index + 1
    octave, offset = divmod(index - _EXACT, _PER_OCTAVE)
    shift = octave + 1
    return (_PER_OCTAVE + offset) << shift, (_PER_OCTAVE + offset + 1) << shift
