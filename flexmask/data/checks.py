"""Checks that a chat template writes everything it is given: no thinking, call or tool is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from flexmask.data.template import ChatTemplate, Message
from flexmask.errors import TemplateError

_TEXTS = {"reasoning_content": "thinking", "content": "content"}


def check_turn(
    template: ChatTemplate,
    prompt: str,
    history: Sequence[Message],
    message: Message,
    written: str,
) -> None:
    """Return None if `written`, the completion of `prompt`, holds all of `message`.

    The words of the message must be there as they are, the thinking before the content. The turn
    is also written with a mark in place of every text, name and argument, and all marks must
    appear: a short text may be found in a turn by accident, a mark is not.

    Raises:
        TemplateError: something is lost or changed, or the message's text holds the stop token.
    """
    start = 0
    for key, name in _TEXTS.items():
        words = message.get(key, "").strip()
        found = written.find(words, start)
        if found < 0:
            raise TemplateError(_lost(name))
        start = found + len(words)
    marked, marks = _mark_message(message)
    completion = template.completion(prompt, history, marked)
    for mark, name in marks.items():
        if mark not in completion:
            raise TemplateError(_lost(name))
    _check_stop(template, message, written)


def check_context(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """Return None if the prompt after `messages` holds the tools and all that others said.

    Raises:
        TemplateError: the template leaves one out.
    """
    numbers = count()
    marks = {}
    marked = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            mark = _mark(numbers)
            marks[mark] = f"message {index} (role {message['role']})"
            message = {**message, "content": mark}
        marked.append(message)
    tools = []
    for index, tool in enumerate(template.tools or []):
        mark = _mark(numbers)
        marks[mark] = f"tool {index} ({tool['function']['name']})"
        tools.append({**tool, "function": {**tool["function"], "name": mark}})
    marking = ChatTemplate(template.tokenizer, tools or None, template.settings)
    written = marking.prompt(marked)
    for mark, name in marks.items():
        if mark not in written:
            raise TemplateError(
                f"the chat template leaves out {name}; remove it from the data, or use a template "
                "that writes it"
            )


def _mark_message(message: Message) -> tuple[Message, dict[str, str]]:
    """Return `message` with its texts, names and arguments marked, and what each mark is for."""
    numbers = count()
    marks: dict[str, str] = {}

    def mark(name: str) -> str:
        text = _mark(numbers)
        marks[text] = name
        return text

    marked = dict(message)
    for key, name in _TEXTS.items():
        if message.get(key, "").strip():
            marked[key] = mark(name)
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": mark(f"tool call {index}"),
                    "arguments": {
                        key: mark(f"argument {key!r} of tool call {index}")
                        for key in call["function"]["arguments"]
                    },
                },
            }
            for index, call in enumerate(message["tool_calls"])
        ]
    return marked, marks


def _check_stop(template: ChatTemplate, message: Message, written: str) -> None:
    stops = {template.stop_token(written), template.tokenizer.eos_token}
    for text in _texts(message):
        for stop in stops:
            if stop and stop in text:
                raise TemplateError(
                    f"the text holds the stop token {stop!r}, at which generation would end; "
                    'remove it or give the message "train": false'
                )


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts([key, item])
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def _mark(numbers: Iterator[int]) -> str:
    return f"flexmask{next(numbers)}mark"


def _lost(name: str) -> str:
    remedy = (
        "use a template that writes reasoning_content, or remove the thinking from the data"
        if name == "thinking"
        else "use a template that writes it, or remove it from the data"
    )
    return f"the chat template drops or changes the message's {name}; {remedy}"
