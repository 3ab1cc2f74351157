"""A chat template that writes each message once for every way in which it can come out.

Rendering the prompt of turn 64 runs the template's loop over all messages before it, most of which
come out as they did for turn 63. `TurnRenderer` remembers them; `loops.py` says why that
is exact. A loop of which that cannot be said runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.utils import Namespace

from flexmask.data.loops import RUN_LOOP, LoopSite, rewrite_loops

_PROBE = "{{ flexmask_seen() }}"
_LONGEST_KEY = 4  # elements of a list that was made by the template, to count by its elements
_UNSET = object()

# What the expressions of a template can raise in the sandbox of transformers.
RAISED_BY_TEMPLATES = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RecursionError),
)

_Outcome = tuple[str, list[tuple[str, str, Any]]]  # text; namespace, attribute and value set
_seen: ContextVar[dict[str, Any]] = ContextVar("_seen")


class TurnRenderer:
    """Renders many prompts of one conversation with one template.

    Args:
        render: renders messages with a template of another text: the tokenizer's
            `apply_chat_template` with the tools and settings of the conversation. It is asked once
            what a template gets to see.
        source: the text of the template.

    Attributes:
        num_run: passes through the loops over messages that the template made so far; the others
            came from memory.
    """

    def __init__(self, render: Callable[[Sequence[Any], str], str], source: str) -> None:
        self.num_run = 0
        self._render_with = render
        self._template, self._sites, self._keys = _rewritten(source)
        self._variables: dict[str, Any] = {}
        self._as_seen: dict[int, tuple[Any, Any]] = {}  # message and what the template sees of it
        self._kept: dict[int, Any] = {}  # objects that keys may name by their id
        self._memory: dict[Any, dict[Any, _Outcome]] = {}

    def render(self, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
        """The text of `messages`, which must not be changed as long as this object lives.

        Raises:
            RAISED_BY_TEMPLATES: the template fails.
        """
        try:
            seen = [self._as_seen[id(message)][1] for message in messages]
        except KeyError:
            self.meet(messages)
            seen = [self._as_seen[id(message)][1] for message in messages]
        return self._template.render(
            {
                **self._variables,
                "messages": seen,
                "add_generation_prompt": add_generation_prompt,
                RUN_LOOP: self._run_loop,
            }
        )

    def meet(self, messages: Sequence[Any]) -> None:
        """Let `apply_chat_template` bring messages into the form that templates see."""
        new = [message for message in messages if id(message) not in self._as_seen]
        if not new:
            return
        _probe()
        self._render_with(new, _PROBE)
        variables = _seen.get()
        for message, copy in zip(new, variables.pop("messages"), strict=True):
            self._as_seen[id(message)] = (message, copy)
            self._kept[id(copy)] = copy
        if not self._variables:
            self._variables = variables
            for value in variables.values():
                parts = value if isinstance(value, list) else []
                self._kept.update((id(kept), kept) for kept in (value, *parts))

    def _run_loop(
        self, number: int, iterable: Any, values: list[Any], caller: Callable[..., str]
    ) -> str:
        """What the loop `number` over `iterable` writes; `values` are those of its site's names."""
        site, items = self._sites[number], list(iterable)
        outside = dict(zip(site.names, values, strict=True))
        texts: list[str] = []
        try:
            for text in self._passes(number, outside, caller, items):
                texts.append(text)
        except UnknownReadError:
            for i in range(len(texts), len(items)):
                self.num_run += 1
                texts.append(caller(items[i], _Loop(items, i)))
        return "".join(texts)

    def _passes(
        self, number: int, outside: dict[str, Any], caller: Callable[..., str], items: list[Any]
    ) -> Iterator[str]:
        """What each pass writes, from memory where it can be.

        Raises:
            UnknownReadError: no key can stand for the next pass.
        """
        site = self._sites[number]
        began: dict[tuple[str, str], Any] = {}  # the changing attributes as the pass begins
        memory = self._memory_of(site, number, outside, began)
        numbers, lists = _inputs_of(site, outside)
        ids = self._ids(items)
        keys = self._keys[number](len(items), ids, numbers, list(map(self._ids, lists)), began)
        if not site.changing:
            yield from self._steady_passes(site, memory, list(keys), outside, caller, items)
            return
        for i, key in enumerate(keys):
            known = memory.get(key)
            if known is None:
                known = memory[key] = self._run_pass(site, outside, caller, items, i)
            text, written = known
            for name, attribute, value in written:
                outside[name][attribute] = value
            yield text
            if written:
                memory = self._memory_of(site, number, outside, began)

    def _steady_passes(
        self,
        site: LoopSite,
        memory: dict[Any, _Outcome],
        keys: list[Any],
        outside: dict[str, Any],
        caller: Callable[..., str],
        items: list[Any],
    ) -> list[str]:
        """What the passes write of which none reads what another has set."""
        for i, key in enumerate(keys):
            if key not in memory:
                memory[key] = self._run_pass(site, outside, caller, items, i)
        outcomes = [memory[key] for key in keys]
        if site.set_only:
            last = {(n, a): value for _, written in outcomes for n, a, value in written}
            for (name, attribute), value in last.items():
                outside[name][attribute] = value
        return [text for text, _ in outcomes]

    def _run_pass(
        self,
        site: LoopSite,
        outside: dict[str, Any],
        caller: Callable[..., str],
        items: list[Any],
        i: int,
    ) -> _Outcome:
        """What one pass writes, and the attributes of namespaces that it changes."""
        self.num_run += 1
        before = [(n, a, getattr(outside[n], a)) for n, a in (*site.changing, *site.set_only)]
        for name, attribute in site.set_only:
            outside[name][attribute] = _UNSET  # the body does not read it
        text = caller(items[i], _Loop(items, i))
        written = []
        for name, attribute, value in before:
            now = getattr(outside[name], attribute)
            if now is _UNSET:
                outside[name][attribute] = value
            elif now is not value or (name, attribute) in site.set_only:
                written.append((name, attribute, now))
        return text, written

    def _memory_of(
        self, site: LoopSite, number: int, outside: dict[str, Any], began: dict[Any, Any]
    ) -> dict[Any, _Outcome]:
        """The passes known for the values that variables from outside have now."""
        steady = [self._key(outside[name]) for name in site.whole]
        for name, attribute in site.steady:
            steady.append(self._key(_attribute(outside[name], attribute)))
        for name, attribute in site.changing:
            began[name, attribute] = _attribute(outside[name], attribute)
            steady.append(self._key(began[name, attribute]))
        for name, attribute in site.set_only:
            _attribute(outside[name], attribute)
        return self._memory.setdefault((number, *steady), {})

    def _ids(self, items: list[Any]) -> list[Any]:
        """For each item what tells it from the others: its id where it stays, else its key."""
        ids = list(map(id, items))
        if all(map(self._kept.__contains__, ids)):
            return ids
        return [
            i if i in self._kept else self._key(item) for i, item in zip(ids, items, strict=True)
        ]

    def _key(self, value: Any) -> Any:
        """A hashable that is equal for equal values only.

        Raises:
            UnknownReadError: the value may change, or is too long to be compared.
        """
        kind = type(value)
        if kind is str:
            return value
        if kind is bool or kind is int or value is None:
            return (kind, value)  # since True == 1
        if id(value) in self._kept:
            return (object, id(value))
        if isinstance(value, jinja2.Undefined):
            return (jinja2.Undefined,)
        if kind is list and len(value) <= _LONGEST_KEY:
            return (list, *map(self._key, value))
        if any(value is known for known in self._template.globals.values()):
            return (callable, id(value))
        raise UnknownReadError


class UnknownReadError(Exception):
    """A value that no key can stand for: the body of the loop has to run."""


class _Loop:
    """What a template reads of its `loop`, in one pass."""

    def __init__(self, items: list[Any], i: int) -> None:
        n = len(items)
        self.index0, self.index = i, i + 1
        self.revindex0, self.revindex = n - i - 1, n - i
        self.first, self.last, self.length = i == 0, i == n - 1, n
        self.previtem = items[i - 1] if i else jinja2.Undefined(name="previtem")
        self.nextitem = items[i + 1] if i < n - 1 else jinja2.Undefined(name="nextitem")


def _inputs_of(site: LoopSite, outside: dict[str, Any]) -> tuple[list[int], list[list[Any]]]:
    """The numbers and lists that the site's reads are computed from.

    Raises:
        UnknownReadError: a value is of another type.
    """
    numbers = [
        outside[name] if attribute is None else _attribute(outside[name], attribute)
        for name, attribute in site.inputs.numbers
    ]
    lists = [outside[name] for name in site.inputs.lists]
    if {*map(type, numbers)} - {int} or {*map(type, lists)} - {list}:
        raise UnknownReadError
    return numbers, lists


def _attribute(value: Any, attribute: str) -> Any:
    """The attribute of a namespace.

    Raises:
        UnknownReadError: `value` is no namespace, or has no such attribute.
    """
    found = getattr(value, attribute, _UNSET) if isinstance(value, Namespace) else _UNSET
    if found is _UNSET:
        raise UnknownReadError
    return found


@lru_cache(maxsize=8)
def num_listed(source: str) -> int:
    """How many loops of a template are remembered from turn to turn; 0 where none can be."""
    return len(_rewritten(source)[1])


@lru_cache(maxsize=8)
def _rewritten(
    source: str,
) -> tuple[jinja2.Template, list[LoopSite], list[Callable[..., Iterator[Any]]]]:
    """The template with its loops rewritten, compiled in transformers' own environment."""
    environment = _compiled(source).environment
    tree = environment.parse(source)
    sites = rewrite_loops(tree)
    code = environment.compile(tree)
    template = environment.template_class.from_code(
        environment, code, environment.make_globals(None)
    )
    arguments = "n, ids, number, lists, began"
    names = {"__builtins__": {}, "len": len, "range": range}
    keys = [
        eval(f"lambda {arguments}: ((ids[i], {site.reads}) for i in range(n))", names)
        for site in sites
    ]
    return template, sites, keys


@lru_cache(maxsize=8)
def syntax_error(source: str) -> jinja2.TemplateSyntaxError | None:
    """The mistake that keeps a template from being compiled, None if there is none."""
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        return error
    return None


@lru_cache(maxsize=1)
def _probe() -> None:
    """Make the template `_PROBE` note what it can see."""
    globals_ = _compiled(_PROBE).environment.globals

    @jinja2.pass_context
    def flexmask_seen(context: jinja2.runtime.Context) -> str:
        everything = context.get_all()
        own = {name: v for name, v in everything.items() if globals_.get(name, _UNSET) is not v}
        _seen.set(own)
        return ""

    globals_["flexmask_seen"] = flexmask_seen


def _compiled(source: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)
