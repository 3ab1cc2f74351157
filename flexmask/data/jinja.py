"""A tokenizer's compiled chat template, called directly with messages that are prepared once.

`apply_chat_template` copies tools and messages into plain data for every text. The texts of a
conversation are made of the same messages, so here each message is copied once, by
`apply_chat_template` itself: it is given a template that notes what a template gets to see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import DataError, TemplateError, did_you_mean

Message = dict[str, Any]

# What transformers gives to every template.
_GIVEN = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("raise_exception", "strftime_now", "namespace", "range", "bos_token", "eos_token"),
}
CHATML = "chatml"  # for models without a template; its turns end with <|im_end|>
CLOCK = "strftime_now"  # how templates read the date, a function that transformers gives them
_CAPTURE = "{{ flexmask_capture() }}"
_captured: ContextVar[dict[str, Any]] = ContextVar("_captured")


def read_template(name: str) -> str:
    """The chat template in a file, or the one that ships as CHATML; DataError where there is none.

    A file of that name comes first.
    """
    path = Path(name)
    if name == CHATML and not path.exists():
        path = TOKENIZER_PATH / "chat_template.jinja"
    if not path.is_file():
        raise DataError(f"{path}: no such file; --chat_template names a Jinja file, or {CHATML!r}")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; --chat_template names a Jinja file in UTF-8"
        ) from None
    if not template.strip():
        raise DataError(f"{path}: is empty; --chat_template names a Jinja file")
    return template


class CompiledTemplate:
    """Renders slices of one conversation as `apply_chat_template` does, byte for byte.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas, or None.
        settings: variables for the template; `CLOCK` in place of the function of that name.
    """

    def __init__(
        self, tokenizer: Any, tools: list[dict[str, Any]] | None, settings: dict[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._common = {"tools": tools, "tokenize": False, **settings}
        self._clock = {CLOCK: settings[CLOCK]} if CLOCK in settings else {}
        self._template: Any = None
        self._variables: dict[str, Any] = {}
        self._prepared: dict[int, tuple[Message, Any]] = {}  # by id: the message, and its copy

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of `messages`, which must not be changed as long as this object lives."""
        if not _is_stock(self._tokenizer):
            return self._tokenizer.apply_chat_template(
                list(map(_for_template, messages)),
                add_generation_prompt=add_generation_prompt,
                **self._common,
            )
        new = [message for message in messages if id(message) not in self._prepared]
        if new or not messages:  # transformers refuses an empty conversation
            self._prepare(new)
        return self._template.render(
            {
                **self._variables,
                "messages": [self._prepared[id(message)][1] for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def _prepare(self, new: Sequence[Message]) -> None:
        source = self._tokenizer.get_chat_template(None, self._common["tools"])
        given = list(map(_for_template, new))
        if _takes_parts(source):
            given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in given]
        _compiled(_CAPTURE).environment.globals["flexmask_capture"] = _capture
        self._tokenizer.apply_chat_template(given, chat_template=_CAPTURE, **self._common)
        self._variables = _captured.get() | self._clock  # transformers takes no functions
        for message, copy in zip(new, self._variables.pop("messages"), strict=True):
            self._prepared[id(message)] = (message, copy)
        if self._template is None:
            self._template = _compiled(source)


def check_template(tokenizer: Any, name: str | None = None) -> None:
    """Raise TemplateError unless a tokenizer has a chat template that is one, or writes without.

    Args:
        tokenizer: a Hugging Face tokenizer.
        name: what to call it in an error: a template's file, or a tokenizer's folder or hub id.
    """
    templates = getattr(tokenizer, "chat_template", None)
    where = "" if name is None else f"{name}: "
    if not templates and hasattr(tokenizer, "apply_chat_template") and not _is_stock(tokenizer):
        return  # an encoder in Python (DeepSeek V3.2 and V4)
    if not templates:
        raise TemplateError(
            f"{where}the tokenizer has no chat template; set tokenizer.chat_template, or name a "
            f"file with --chat_template, or {CHATML!r}"
        )
    for source in _sources(tokenizer):
        if (mistake := _syntax_error(source)) is not None:
            raise TemplateError(
                f"{where}the chat template is no Jinja template: {mistake}; mend the template"
            )


def template_variables(tokenizer: Any, tools: Any = None) -> frozenset[str]:
    """The names that a tokenizer's chat template reads and does not always set: its settings.

    Empty for a tokenizer that renders in a way of its own.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas, or None; some tokenizers have a template of its own for them.
    """
    if not _is_stock(tokenizer):
        return frozenset()
    return _variables(tokenizer.get_chat_template(None, tools)) - _GIVEN


def template_words(tokenizer: Any) -> frozenset[str] | None:
    """The words of a tokenizer's chat templates, among them all keys of messages that they name.

    None for a tokenizer that renders in a way of its own.
    """
    return _words("\n".join(_sources(tokenizer))) if _is_stock(tokenizer) else None


def check_settings(tokenizer: Any, names: Iterable[str]) -> None:
    """Raise TemplateError for a setting that no chat template of the tokenizer reads."""
    if not getattr(tokenizer, "chat_template", None) or not _is_stock(tokenizer):
        return
    read = {name for source in _sources(tokenizer) for name in _variables(source)}
    for name in names:
        if name not in read:
            guess = did_you_mean(name, sorted(read - _GIVEN))
            raise TemplateError(
                f"chat_template_kwargs sets {name!r}{guess}, which the chat template does not "
                "read; leave it out"
            )


def _sources(tokenizer: Any) -> list[str]:
    templates = getattr(tokenizer, "chat_template", None) or ""
    return list(templates.values()) if isinstance(templates, dict) else [templates]


@lru_cache(maxsize=8)
def _words(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", source))


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    return frozenset(meta.find_undeclared_variables(_compiled(source).environment.parse(source)))


@lru_cache(maxsize=8)
def _takes_parts(source: str) -> bool:
    """Whether a template writes a message whose content is in parts, and no plain text (LLaVA)."""
    text = "flexmasktext"

    def writes(content: Any) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            return text in _compiled(source).render(messages=messages, bos_token="", eos_token="")
        except Exception:  # a template is a foreign program: it raises what it likes
            return False

    return not writes(text) and writes([{"type": "text", "text": text}])


@lru_cache(maxsize=8)
def _syntax_error(source: str) -> str | None:
    """Where and what keeps a template from being compiled; None if nothing does."""
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (RecursionError, SyntaxError):  # of the Python code that Jinja makes of it
        return "it is nested too deep"
    return None


def _is_stock(tokenizer: Any) -> bool:
    """Whether a tokenizer's `apply_chat_template` is that of transformers."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(tokenizer.apply_chat_template, "__func__", None)
    return own is PreTrainedTokenizerBase.apply_chat_template


def _for_template(message: Message) -> Message:
    message = {key: value for key, value in message.items() if key != "train"}
    if "reasoning_content" in message:
        message["thinking"] = message["reasoning_content"]  # the name in gpt-oss and LFM2.5
    return message


@jinja2.pass_context
def _capture(context: jinja2.runtime.Context) -> str:
    """Note the variables that a template is given, without the globals of its environment."""
    own = context.environment.globals
    seen = context.get_all().items()
    _captured.set({name: v for name, v in seen if name not in own or own[name] is not v})
    return ""


def _compiled(source: str) -> Any:
    """The template, compiled by transformers in its own sandbox, once."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)
