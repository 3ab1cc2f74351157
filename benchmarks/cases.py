"""The cases there are, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from benchmarks.record import Measurement

CASES = (
    *("exactness", "rendering", "layout", "packing", "mask", "attention", "shapes", "step"),
    *("memory", "kernels"),
)
WITH_DEVICE = ("kernels",)  # these run on a GPU, in steps, and say where they cannot


def load_case(name: str) -> ModuleType:
    """The module of a case: TITLE, ABOUT, measure, tables and draw."""
    return import_module(f"benchmarks.{name}")


def why_not(name: str, *, quick: bool) -> str | None:
    """The reason why this machine cannot run a case, or None."""
    if name not in WITH_DEVICE:
        return None
    try:
        return load_case(name).why_not(quick=quick)
    except ModuleNotFoundError as missing:
        return f"needs the package {missing.name}"


def device_of(name: str) -> str:
    """What a case runs on: "cuda" where there is one and the case is for it, else "cpu"."""
    return load_case(name).device() if name in WITH_DEVICE else "cpu"


def measure_in_steps(name: str, *, quick: bool, **options: Any) -> Iterator[Measurement]:
    """The measurement of a case, whole after each of its steps; most cases have one.

    Args:
        name: of the case.
        quick: tiny shapes.
        **options: of cases in WITH_DEVICE: `limit_s`, and the record that it goes on with.
    """
    module = load_case(name)
    if name in WITH_DEVICE:
        yield from module.measure_in_steps(quick=quick, **options)
    else:
        yield module.measure(quick=quick)
