"""Checks that a chat template writes everything it is given: no thinking, call or tool is lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

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
    marks = Marks()
    lost = marks.missing(template.completion(prompt, history, mark_message(message, marks)))
    if lost is not None:
        raise TemplateError(_lost(lost))
    _check_stop(template, message, written)


def check_context(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """Return None if the prompt after `messages` holds the tools and all that others said.

    Raises:
        TemplateError: the template leaves one out.
    """
    marks = Marks()
    marked = [
        message
        if message["role"] == "assistant"
        else {**message, "content": marks.add(f"message {index} (role {message['role']})")}
        for index, message in enumerate(messages)
    ]
    tools = []
    for index, tool in enumerate(template.tools or []):
        mark = marks.add(f"tool {index} ({tool['function']['name']})")
        tools.append({**tool, "function": {**tool["function"], "name": mark}})
    lost = marks.missing(ChatTemplate(template.tokenizer, tools, template.settings).prompt(marked))
    if lost is not None:
        raise TemplateError(
            f"the chat template leaves out {lost}; remove it from the data, or use a template that "
            "writes it"
        )


class Marks(dict[str, str]):
    """Texts that stand for parts of a conversation, in order, and the name of each part.

    Attributes:
        PATTERN: finds them in what a template writes, and the number of each.
    """

    PATTERN = re.compile("flexmask([0-9]+)mark")

    def add(self, name: str) -> str:
        """A new mark for the part `name`."""
        mark = f"flexmask{len(self)}mark"
        self[mark] = name
        return mark

    def missing(self, written: str) -> str | None:
        """The first part whose mark is not in `written`."""
        return next((name for mark, name in self.items() if mark not in written), None)


def mark_message(message: Message, marks: Marks) -> Message:
    """Return `message` with a new mark of `marks` in place of every text, name and argument."""
    marked = dict(message)
    for key, name in _TEXTS.items():
        if message.get(key, "").strip():
            marked[key] = marks.add(name)
    if "tool_calls" in message:
        marked["tool_calls"] = []
    for index, call in enumerate(message.get("tool_calls", [])):
        name = marks.add(f"tool call {index}")
        arguments = {
            key: marks.add(f"argument {key!r} of tool call {index}")
            for key in call["function"]["arguments"]
        }
        function = {"name": name, "arguments": arguments}
        marked["tool_calls"].append({**call, "function": function})
    return marked


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


def _lost(name: str) -> str:
    remedy = (
        "use a template that writes reasoning_content, or remove the thinking from the data"
        if name == "thinking"
        else "use a template that writes it, or remove it from the data"
    )
    return f"the chat template drops or changes the message's {name}; {remedy}"
