"""Expressions of a template's loop body that can be computed before the body runs, as Python.

Jinja compiles `+`, `>`, `not` and the like to the same operators of Python, so that the value is
the one that the body would see; what could differ (undefined values, other types) is left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from jinja2 import nodes

LOOP_ATTRIBUTES = {  # in Python, of the pass i, the ids of the items and their number n
    "index0": "i",
    "index": "i + 1",
    "first": "i == 0",
    "last": "i == n - 1",
    "length": "n",
    "revindex": "n - i",
    "revindex0": "n - i - 1",
    "previtem": "ids[i - 1] if i else None",
    "nextitem": "ids[i + 1] if i < n - 1 else None",
}
_NUMBERS = {"index0", "index", "length", "revindex", "revindex0"}
_TRUTHS = {"first", "last"}
_ARITHMETIC: dict[type[nodes.Node], str] = {nodes.Add: "+", nodes.Sub: "-", nodes.Mul: "*"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "lteq": "<=", "gt": ">", "gteq": ">="}


@dataclass(slots=True)
class Inputs:
    """What the expressions of one loop are computed from, beside the pass.

    Attributes:
        numbers: (variable, attribute) of namespaces, or (variable, None); integers.
        lists: variables; lists, of which the ids of the elements are taken.
    """

    numbers: list[tuple[str, str | None]] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)

    def number(self, name: str, attribute: str | None) -> str:
        """The Python name of an integer."""
        if (name, attribute) not in self.numbers:
            self.numbers.append((name, attribute))
        return f"number[{self.numbers.index((name, attribute))}]"

    def list(self, name: str) -> str:
        """The Python name of a list."""
        if name not in self.lists:
            self.lists.append(name)
        return f"lists[{self.lists.index(name)}]"

    def element(self, name: str, place: str) -> str:
        """The Python of what tells an element of a list from the others."""
        listed = self.list(name)
        return f"({listed}[{place}] if -len({listed}) <= {place} < len({listed}) else None)"


def as_python(
    node: nodes.Node, inputs: Inputs, *, unknown: Collection[str], written: Collection[str]
) -> str | None:
    """`node` in Python, or None if it cannot be computed ahead.

    Args:
        node: an expression.
        inputs: what it needs is added.
        unknown: variables that the body sets.
        written: variables of namespaces that the body sets.
    """
    for kind in (_Writer.truth, _Writer.number, _Writer.element):
        tried = Inputs(list(inputs.numbers), list(inputs.lists))
        source = kind(_Writer(tried, frozenset(unknown), frozenset(written)), node)
        if source:
            inputs.numbers, inputs.lists = tried.numbers, tried.lists
            return source
    return None


@dataclass(frozen=True, slots=True)
class _Writer:
    inputs: Inputs
    unknown: frozenset[str]
    written: frozenset[str]

    def truth(self, node: nodes.Node) -> str | None:
        """An expression that is True or False."""
        match node:
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=attribute):
                return f"({LOOP_ATTRIBUTES[attribute]})" if attribute in _TRUTHS else None
            case nodes.Not(node=child):
                inside = self.truth(child)
                return inside and f"(not {inside})"
            case nodes.And(left=left, right=right):
                return _joined(self.truth(left), "and", self.truth(right))
            case nodes.Or(left=left, right=right):
                return _joined(self.truth(left), "or", self.truth(right))
            case nodes.Compare(expr=left, ops=[nodes.Operand(op=op, expr=right)]):
                if op in _COMPARISONS:
                    return _joined(self.number(left), _COMPARISONS[op], self.number(right))
        return None

    def number(self, node: nodes.Node) -> str | None:
        """An expression that is an integer."""
        match node:
            case nodes.Const(value=int() as value) if not isinstance(value, bool):
                return f"({value})"
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=attribute):
                return f"({LOOP_ATTRIBUTES[attribute]})" if attribute in _NUMBERS else None
            case nodes.Getattr(node=nodes.Name(name=name), attr=attribute):
                is_steady = name not in self.unknown and name not in self.written
                return self.inputs.number(name, attribute) if is_steady else None
            case nodes.Name(name=name) if name not in self.unknown and name != "loop":
                return self.inputs.number(name, None)
            case nodes.Filter(node=nodes.Name() as node_, name="length" | "count", args=[]):
                listed = self.list(node_)
                return listed and f"len({listed})"
            case nodes.Add() | nodes.Sub() | nodes.Mul():
                sign = _ARITHMETIC[type(node)]
                return _joined(self.number(node.left), sign, self.number(node.right))
        return None

    def element(self, node: nodes.Node) -> str | None:
        """An expression that is an element of a list, or its neighbour in the loop."""
        match node:
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=attribute):
                return f"({LOOP_ATTRIBUTES[attribute]})" if attribute in LOOP_ATTRIBUTES else None
            case nodes.Getitem(node=nodes.Name() as node_, arg=place) if self.list(node_):
                number = self.number(place)
                return number and self.inputs.element(node_.name, number)
        return None

    def list(self, node: nodes.Name) -> str | None:
        return None if node.name in self.unknown | {"loop"} else self.inputs.list(node.name)


def _joined(left: str | None, sign: str, right: str | None) -> str | None:
    return f"({left} {sign} {right})" if left and right else None
