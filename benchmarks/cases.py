"""The cases there are, in the order of the report."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

CASES = (
    *("exactness", "rendering", "layout", "packing", "mask", "attention", "shapes", "step"),
    *("memory", "scaling"),
)


def load_case(name: str) -> ModuleType:
    """The module of a case: TITLE, ABOUT, measure, tables and draw."""
    return import_module(f"benchmarks.{name}")
