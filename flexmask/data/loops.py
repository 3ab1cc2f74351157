"""The loops over messages in a chat template: what one pass through their body depends on.

A Jinja template is a deterministic program, and its sandbox keeps it from changing what it reads.
One pass through the body of a loop is therefore a function of the values that the body reads: the
element, its place in the loop, and variables from outside. `rewrite_loops` finds them in the syntax
tree and makes the body a macro:

    {% for message in messages %}BODY{% endfor %}
    {% call(message, loop) flexmask_loop(site, messages, [what BODY reads]) %}BODY{% endcall %}

`flexmask_loop` (`memo.py`) then runs BODY only for values that it has not met before.
Expressions such as `loop.index0 > ns.last_query_index` and `messages[loop.index0 - 1]` count by
their value and not by their parts: the value is what one turn has in common with the next. For the
same reason, what stands behind `{% if ns.searching and ...` counts only where that is true. A loop
whose reads cannot be listed stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from jinja2 import nodes

from flexmask.data.reads import LOOP_ATTRIBUTES, Inputs, as_python

RUN_LOOP = "flexmask_loop"
NodeT = TypeVar("NodeT", bound=nodes.Node)
Attribute = tuple[str, str]  # variable and attribute of a namespace


@dataclass(frozen=True, slots=True)
class LoopSite:
    """A loop whose body is a function of the element and of what is listed here.

    Attributes:
        names: the variables from outside, in the order in which they are handed over.
        whole: those that count by their value.
        steady: attributes that count by their value, and that no pass changes.
        changing: attributes that count by their value at the beginning of the pass.
        set_only: attributes that the body may set and does not read.
        inputs: what `reads` is computed from.
        reads: Python source of the tuple of expressions that count by their value in each pass.
    """

    names: tuple[str, ...]
    whole: tuple[str, ...]
    steady: tuple[Attribute, ...]
    changing: tuple[Attribute, ...]
    set_only: tuple[Attribute, ...]
    inputs: Inputs
    reads: str


class _UnlistedError(Exception):
    """The body may depend on something that cannot be listed."""


_REFUSED = (  # other files, other scopes, macros that close over a pass
    *(nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Macro),
    *(nodes.With, nodes.Scope, nodes.OverlayScope, nodes.EvalContextModifier),
    *(nodes.ContextReference, nodes.DerivedContextReference),
)
_REFUSED_NAMES = {"caller", "cycler", "joiner", "kwargs", "lipsum", "self", "super", "varargs"}
_REFUSED_FILTERS = {"random"}


def rewrite_loops(template: nodes.Template) -> list[LoopSite]:
    """Rewrite, in place, the outermost loops that can be listed; returns them in order."""
    sites: list[LoopSite] = []
    _rewrite(template.body, template, sites)
    return sites


def _rewrite(body: list[nodes.Node], template: nodes.Template, sites: list[LoopSite]) -> None:
    for place, node in enumerate(body):
        if isinstance(node, nodes.If):
            for branch in (node.body, *(other.body for other in node.elif_), node.else_):
                _rewrite(branch, template, sites)
        elif isinstance(node, nodes.For):
            try:
                site = _Body(node, template).site()
            except _UnlistedError:
                continue
            body[place] = _call(node, len(sites), site)
            sites.append(site)


def _call(loop: nodes.For, number: int, site: LoopSite) -> nodes.CallBlock:
    """The call that stands in place of `loop`."""
    assert isinstance(loop.target, nodes.Name)
    values = nodes.List([nodes.Name(name, "load") for name in site.names])
    arguments = [nodes.Const(number), loop.iter, values]
    call = nodes.Call(nodes.Name(RUN_LOOP, "load"), arguments, [], None, None)
    parameters = [nodes.Name(loop.target.name, "param"), nodes.Name("loop", "param")]
    block = nodes.CallBlock(call, parameters, [], loop.body, lineno=loop.lineno)
    assert loop.environment is not None
    block.set_environment(loop.environment)
    return block


class _Body:
    """The reads and writes of one loop's body."""

    def __init__(self, loop: nodes.For, template: nodes.Template) -> None:
        if loop.else_ or loop.test or loop.recursive or not isinstance(loop.target, nodes.Name):
            raise _UnlistedError
        self.loop = loop
        self.target = loop.target.name
        self.inner = set(_stored(loop.body)) | {self.target}
        self.macros = _macros(template)
        outside = [node for node in template.body if not isinstance(node, nodes.Macro)]
        self.outer = set(_stored(outside, leave_out=loop))
        self.aliases = self._aliases()
        self.first_if = self._first_if()
        self.bare: set[str] = set()
        self.attributes: set[Attribute] = set()
        self.written: set[Attribute] = set()
        self.inputs = Inputs()
        self.reads: dict[str, None] = {}  # in order
        self.entered: set[str] = set()
        self.guards: list[str] = []

    def site(self) -> LoopSite:
        """What was found; _UnlistedError where it is not all."""
        for reference in _find(self.loop.body, nodes.NSRef):
            self._write(reference)
        self._enter_macros(self.loop.body)
        self.may_change = {name for name, _ in self.written}
        for node in self.loop.body:
            self._visit(node, is_own_loop=True)
        changing = self.attributes & self.written
        names = self.bare | {name for name, _ in self.attributes | self.written}
        names.update(name for name, _ in self.inputs.numbers)
        names.update(self.inputs.lists)
        return LoopSite(
            names=tuple(sorted(names)),
            whole=tuple(sorted(self.bare)),
            steady=tuple(sorted(self.attributes - self.written)),
            changing=tuple(sorted(changing)),
            set_only=tuple(sorted(self.written - changing)),
            inputs=self.inputs,
            reads="".join(f"{read}, " for read in self.reads),
        )

    def _aliases(self) -> dict[str, nodes.Node]:
        """Variables that the body sets once, before all else, and what they are set to."""
        aliases: dict[str, nodes.Node] = {}
        stored = list(_stored(self.loop.body))
        for node in self.loop.body:
            if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
                used = {name.name for name in _find([node.node], nodes.Name)}
                if stored.count(node.target.name) == 1 and not used & self.inner - {self.target}:
                    aliases[node.target.name] = node.node
            elif not _is_text(node):
                break
        return aliases

    def _first_if(self) -> nodes.Node | None:
        """The `if` before which no namespace can have changed since the pass began."""
        for node in self.loop.body:
            if isinstance(node, nodes.If):
                return node
            if not (_is_text(node) or isinstance(node, nodes.Assign)) or self._may_write(node):
                return None
        return None

    def _may_write(self, node: nodes.Node) -> bool:
        named = {name.name for name in _find([node], nodes.Name)}
        return bool(named & self.macros.keys()) or any(True for _ in _find([node], nodes.NSRef))

    def _write(self, reference: nodes.NSRef) -> None:
        if reference.name not in self.inner:
            self.written.add((reference.name, reference.attr))
        elif reference.name in self.outer or reference.name == self.target:
            raise _UnlistedError  # a namespace of that name is inside as well as outside

    def _enter_macros(self, body: list[nodes.Node]) -> None:
        """Count what the macros that `body` names read and write, and those that they name."""
        for name in {use.name for use in _find(body, nodes.Name)} & self.macros.keys():
            if name in self.entered:
                continue
            self.entered.add(name)
            children = list(self.macros[name].iter_child_nodes())
            own = set(_stored(children))
            if name in self.inner or own & self.outer:
                raise _UnlistedError  # a variable of that name is inside as well as outside
            for reference in _find(children, nodes.NSRef):
                if reference.name not in own:
                    self._write(reference)
            for child in children:
                self._visit_macro(child, own)
            self._enter_macros(children)

    def _visit_macro(self, node: nodes.Node, own: set[str]) -> None:
        """Count a node of a macro, which does not see the loop; `own` are its own variables."""
        _refuse(node)
        known = own | self.macros.keys() | {"loop"}
        if isinstance(node, nodes.Getattr) and _name(node.node) not in known | self.inner | {""}:
            self.attributes.add((_name(node.node), node.attr))
            return
        if isinstance(node, nodes.Name) and node.name not in known:
            if node.name in self.inner or node.name in _REFUSED_NAMES:
                raise _UnlistedError
            self.bare.add(node.name)
        for child in node.iter_child_nodes():
            self._visit_macro(child, own)

    def _visit(self, node: nodes.Node, is_own_loop: bool) -> None:
        """Count `node`; `loop` means the loop itself where `is_own_loop`."""
        _refuse(node)
        if isinstance(node, nodes.Break | nodes.Continue) and is_own_loop:
            raise _UnlistedError
        if isinstance(node, nodes.For):
            self._visit_inner(node, is_own_loop)
        elif isinstance(node, nodes.If) and is_own_loop:
            self._visit_if(node)
        elif isinstance(node, nodes.Assign) and self.aliases.get(_name(node.target)) is node.node:
            pass  # counts where it is used
        elif not self._count(node, is_own_loop):
            for child in node.iter_child_nodes():
                self._visit(child, is_own_loop)

    def _visit_inner(self, loop: nodes.For, is_own_loop: bool) -> None:
        aside = [*loop.else_, *([loop.test] if loop.test is not None else [])]
        if any(name.name == "loop" for name in _find(aside, nodes.Name)):
            raise _UnlistedError  # which loop is meant is hard to tell
        self._visit(loop.iter, is_own_loop)
        for child in [*loop.body, *aside]:
            self._visit(child, is_own_loop=False)

    def _visit_if(self, node: nodes.If) -> None:
        """Count the branches; what is behind the first condition only where that is true."""
        first: nodes.Node = node.test
        while isinstance(first, nodes.And):
            first = first.left
        guard = self._guard(first) if node is self.first_if else None
        self._visit(first, is_own_loop=True)
        if guard is not None:
            self.guards.append(guard)
        for condition in _others(node.test, first):
            self._visit(condition, is_own_loop=True)
        for child in node.body:
            self._visit(child, is_own_loop=True)
        if guard is not None:
            self.guards.pop()
        for child in [*node.elif_, *node.else_]:
            self._visit(child, is_own_loop=True)

    def _guard(self, condition: nodes.Node) -> str | None:
        """Python of a namespace's attribute as it was when the pass began."""
        match condition:
            case nodes.Getattr(node=nodes.Name(name=name), attr=attribute):
                if (name, attribute) in self.written:
                    return f"began[{(name, attribute)!r}]"
        return None

    def _count(self, node: nodes.Node, is_own_loop: bool) -> bool:
        """Count `node` if it is a name or can be computed ahead; False if its parts are to be."""
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            name = node.node.name
            if name == "loop" and is_own_loop and node.attr not in LOOP_ATTRIBUTES:
                raise _UnlistedError
            if name not in self.inner and name not in self.macros and name != "loop":
                self.attributes.add((name, node.attr))
                return True
        if isinstance(node, nodes.Name):
            self._count_name(node, is_own_loop)
            return True
        if isinstance(node, nodes.Const) or not isinstance(node, nodes.Expr) or not is_own_loop:
            return False
        return self._count_read(node)

    def _count_read(self, node: nodes.Node) -> bool:
        read = as_python(node, self.inputs, unknown=self.inner, written=self.may_change)
        if read is None:
            return False
        for guard in self.guards:
            read = f"({read} if {guard} else None)"
        self.reads[read] = None
        return True

    def _count_name(self, node: nodes.Name, is_own_loop: bool) -> None:
        if node.name == "loop":
            if is_own_loop:
                raise _UnlistedError
        elif node.name in _REFUSED_NAMES:
            raise _UnlistedError
        elif node.name in self.aliases:
            if not self._count_read(self.aliases[node.name]):
                self._visit(self.aliases[node.name], is_own_loop=True)
        elif node.ctx == "load" and node.name != self.target and node.name not in self.macros:
            self.bare.add(node.name)


def _refuse(node: nodes.Node) -> None:
    is_unsteady = isinstance(node, nodes.Filter) and node.name in _REFUSED_FILTERS
    if is_unsteady or isinstance(node, _REFUSED):
        raise _UnlistedError


def _others(condition: nodes.Node, first: nodes.Node) -> Iterator[nodes.Node]:
    """The parts of a chain of `and` behind the first."""
    while condition is not first:
        assert isinstance(condition, nodes.And)
        yield condition.right
        condition = condition.left


def _macros(template: nodes.Template) -> dict[str, nodes.Macro]:
    macros: dict[str, nodes.Macro] = {}
    for macro in template.find_all(nodes.Macro):
        if macro.name in macros or not any(macro is node for node in template.body):
            raise _UnlistedError  # which macro a name means depends on the run
        macros[macro.name] = macro
    return macros


def _is_text(node: nodes.Node) -> bool:
    parts = node.nodes if isinstance(node, nodes.Output) else [node]
    return all(isinstance(part, nodes.TemplateData) for part in parts)


def _name(node: nodes.Node) -> str:
    return node.name if isinstance(node, nodes.Name) else ""


def _find(body: Iterable[nodes.Node], kind: type[NodeT]) -> Iterator[NodeT]:
    """Nodes of a kind in `body`, its own members included."""
    for node in body:
        if isinstance(node, kind):
            yield node
        yield from node.find_all(kind)


def _stored(body: Iterable[nodes.Node], leave_out: nodes.Node | None = None) -> Iterator[str]:
    """Names that `body` gives a value to, as variable, target, parameter or macro."""
    for node in body:
        if node is leave_out:
            continue
        if isinstance(node, nodes.Name) and node.ctx != "load":
            yield node.name
        if isinstance(node, nodes.Macro):
            yield node.name
        yield from _stored(node.iter_child_nodes(), leave_out)
