"""Checks that a chat template writes everything it is given: no thinking, call or tool is lost.

What a model writes comes back to its next prompt as text, so a trained message has to be the text
of its tokens. A special token inside it is none: generation ends there, or decoding leaves it out
(`skip_special_tokens`). Spelled in ordinary tokens it would still be a control token wherever the
template writes the message again. Tokens that a tokenizer adds without calling them special, such
as Qwen's `<tool_call>`, are text. So are tags, except the one that ends the part which holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from flexmask.data.template import ChatTemplate, Message, special_tokens
from flexmask.errors import TemplateError

_TEXTS = {"reasoning_content": "thinking", "content": "content"}
_TAG = re.compile(r"<[^<>\s]+>")


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
        TemplateError: something is lost or changed, or the message's text holds a special token or
            the tag at which its thinking, content or argument would end.
    """
    start = 0
    for key, name in _TEXTS.items():
        words = message.get(key, "").strip()
        found = written.find(words, start)
        if found < 0:
            raise TemplateError(_lost(name, template, history, message))
        start = found + len(words)
    marks = Marks()
    marked = template.completion(prompt, history, mark_message(message, marks))
    lost = marks.missing(marked)
    if lost is not None:
        raise TemplateError(_lost(lost, template, history, message))
    _check_special(template, message, written)
    _check_tags(message, marks, marked)


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


def _check_special(template: ChatTemplate, message: Message, written: str) -> None:
    tokens = _pattern(special_tokens(template.tokenizer, len(template.tokenizer)))
    for text in _texts(message):
        match = tokens.search(text)
        if match is None:
            continue
        if match[0] in (template.stop_token(written), template.tokenizer.eos_token):
            name, remedy = f"stop token {match[0]!r}, at which generation would end", ""
        else:
            name = f"special token {match[0]!r}, which decoding would leave out"
            remedy = "; if the model is to write it, mark it as not special in tokenizer.json"
        raise TemplateError(
            f'the text holds the {name}; remove it or give the message "train": false{remedy}'
        )


@lru_cache(maxsize=8)
def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _check_tags(message: Message, marks: Marks, marked: str) -> None:
    for (mark, name), part in zip(marks.items(), _parts(message), strict=True):
        tag = _TAG.search(marked, marked.index(mark))
        if tag is not None and any(tag[0] in text for text in _texts(part)):
            raise TemplateError(
                f"the {name} holds {tag[0]!r}, the tag at which it would end; remove it or give "
                'the message "train": false'
            )


def _parts(message: Message) -> Iterator[object]:
    """What `mark_message` puts marks for, in its order."""
    yield from (message[key] for key in _TEXTS if message.get(key, "").strip())
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]
        yield from call["function"]["arguments"].values()


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts([key, item])
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def _lost(name: str, template: ChatTemplate, history: Sequence[Message], message: Message) -> str:
    remedy = "use a template that writes it, or remove it from the data"
    if name == "thinking":
        remedy = template.thinking_remedy(history, message) or (
            "use a template that writes reasoning_content, or remove the thinking from the data"
        )
    return f"the chat template drops or changes the message's {name}; {remedy}"
