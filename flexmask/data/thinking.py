"""How a chat template treats thinking: which earlier thoughts it writes again, and empty ones.

Two behaviours have names that users know. *Interleaved*: thinking is dropped at a new user message
and kept until then, so through a loop of tool calls. *Preserved*: the thinking of every earlier
turn is kept. Some templates have a setting that changes from one to the other (`preserve_thinking`,
`clear_thinking`, `truncate_history_thinking`): it is found by trying the variables that the source
of the template reads on a conversation of marks. Whether a conversation is written as asked is
verified on that conversation, by `check_history`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from flexmask.data.jinja import Message, template_variables
from flexmask.data.template import CALL, RESULT, ChatTemplate, unannounced
from flexmask.errors import DataError, TemplateError

ThinkingHistory = Literal["template", "interleaved", "preserved"]

_ASKED: Message = {"role": "user", "content": "asked"}
_MARKS = tuple(f"flexmaskthought{number}" for number in range(4))
# Whole, since some templates cannot write a tool without all of these (gpt-oss).
_AT = {"type": "string", "description": "where"}
_LOOK = {
    "name": CALL["tool_calls"][0]["function"]["name"],
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": _AT}, "required": ["at"]},
}
_TOOL = {"type": "function", "function": _LOOK}
_SAID: list[Message] = [
    {"role": "assistant", "content": "said", "reasoning_content": _MARKS[0]},
    {**CALL, "reasoning_content": _MARKS[1]},
    {"role": "assistant", "content": "said", "reasoning_content": _MARKS[2]},
    {**CALL, "reasoning_content": _MARKS[3]},
]
# Two earlier turns, the second with a call, and a loop of calls that has not ended.
_CALLS = [_ASKED, _SAID[0], _ASKED, _SAID[1], RESULT, _SAID[2], _ASKED, _SAID[3], RESULT]
_TALK = [_ASKED, _SAID[0], _ASKED, _SAID[2], _ASKED]
_ALL, _LOOP = frozenset(_MARKS), frozenset(_MARKS[3:])
_NAMES = {_ALL: "preserved", _LOOP: "interleaved", frozenset[str](): "dropped"}
_WANTED = {"interleaved": _LOOP, "preserved": _ALL}


@dataclass(frozen=True, slots=True)
class ThinkingRule:
    """What a template with some settings does with thinking.

    Attributes:
        history: of earlier turns: "interleaved", "preserved", "dropped" (in tool loops too),
            "partly preserved", or "none" where the template writes no thinking at all.
        flag: the setting of the template that was set for this, or {}.
        others: settings that would change it, as JSON text, and what it would be then.
        empty_thought: what a turn without thinking begins with if an empty thought is written for
            it, without white space; None where the template has no tags to tell it by.
    """

    history: str
    flag: Mapping[str, Any]
    others: Mapping[str, str]
    empty_thought: str | None

    def has_empty_thought(self, message: Message, completion: str) -> bool:
        """Whether `completion` is that of a message without thinking, with an empty thought."""
        if self.empty_thought is None or message.get("reasoning_content"):
            return False
        return "".join(completion.split()).startswith(self.empty_thought)

    def __str__(self) -> str:
        if self.history == "none":
            return "none, the chat template writes no thinking"
        if self.flag:
            flag = json.dumps(dict(self.flag))
            return f"{self.history}, by the template's {flag}; serve with the same setting"
        others = "".join(f"; {setting} makes it {name}" for setting, name in self.others.items())
        return f"{self.history}, as the template does{others}"


def thinking_rule(
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    asked: ThinkingHistory = "template",
) -> ThinkingRule:
    """The rule of a tokenizer's template, with the flag that makes it behave as asked, or nearest.

    The nearest may do for the conversation at hand, which `check_history` tells.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas, or None; some tokenizers have a template of its own for them.
        settings: of the template; what they set is left as it is.
        asked: "template" for its own default.
    """
    fixed = json.dumps(dict(settings or {}), sort_keys=True)
    probe = _probe(tokenizer, str(tokenizer.chat_template), bool(tools), fixed)
    wanted = _WANTED.get(asked, probe.kept)
    flag, kept = "{}", probe.kept
    for setting, marks in probe.found.items():
        if len(marks ^ wanted) < len(kept ^ wanted):
            flag, kept = setting, marks
    others = {s: _name(marks) for s, marks in probe.found.items() if marks != probe.kept}
    history = _name(kept) if probe.writes_thinking else "none"
    return ThinkingRule(history, json.loads(flag), others, probe.empty_thought)


def check_thinking_history(asked: str) -> None:
    """Raise DataError for what is no behaviour."""
    if asked not in get_args(ThinkingHistory):
        raise DataError(
            f"thinking_history must be one of {get_args(ThinkingHistory)}, got {asked!r}"
        )


def check_history(
    template: ChatTemplate, messages: Sequence[Message], trained: Sequence[int], asked: str
) -> None:
    """Return None if every prompt holds the thinking of those earlier turns that it should.

    Args:
        template: what writes the prompts.
        messages: of the conversation.
        trained: the messages that are trained.
        asked: a `ThinkingHistory`; "template" is whatever the template does.

    Raises:
        TemplateError: a prompt lacks an earlier thought, or holds one too many.
    """
    if asked == "template":
        return
    marks = {i: f"flexmask{i}thought" for i, m in enumerate(messages) if m.get("reasoning_content")}
    marked = [
        {**message, "reasoning_content": marks[i]} if i in marks else message
        for i, message in enumerate(messages)
    ]
    for index in trained:
        asking = [i for i in range(index) if messages[i]["role"] == "user"]
        prompt = template.prompt(marked[:index])
        for earlier, mark in marks.items():
            wanted = asked == "preserved" or earlier > max(asking, default=-1)
            if earlier < index and wanted != (mark in prompt):
                raise TemplateError(
                    f"message {index}: its prompt {'lacks' if wanted else 'holds'} the thinking of "
                    f"message {earlier}, which thinking_history={asked!r} "
                    f"{'keeps' if wanted else 'drops'}, and no other setting of the chat template "
                    "was found to change that; use a template that does, or "
                    "thinking_history='template'"
                )


@dataclass(frozen=True, slots=True)
class _Probe:
    """Which thoughts of the conversation of marks stand in its prompt, by setting."""

    writes_thinking: bool
    empty_thought: str | None
    kept: frozenset[str]
    found: Mapping[str, frozenset[str]]


@lru_cache(maxsize=64)
def _probe(tokenizer: Any, source: str, has_tools: bool, fixed: str) -> _Probe:
    """What a template does with the settings `fixed`, and with one more.

    `source` is that of the template, which may change while the tokenizer stays.
    """
    schemas = [_TOOL] if has_tools else None
    settings = json.loads(fixed)
    with unannounced():
        turns, kept = _try(tokenizer, schemas, settings)
        found = {}
        names = template_variables(tokenizer, schemas) - settings.keys()
        for name in sorted(names, key=lambda name: ("think" not in name, name)):
            for value in (True, False):
                others, marks = _try(tokenizer, schemas, {**settings, name: value})
                if others == turns and marks != kept:
                    found[json.dumps({name: value})] = marks
    thinks = turns[1]
    if _MARKS[0] not in thinks:
        return _Probe(False, None, kept, found)
    thought = thinks.partition("said")[0].replace(_MARKS[0], "")
    return _Probe(True, "".join(thought.split()) or None, kept, found)


def _try(tokenizer: Any, tools: Any, settings: Any) -> tuple[list[str], frozenset[str]]:
    """A first prompt and its completions with and without thinking, and the marks of `_kept`.

    What a template cannot write is "", and no mark.
    """
    template = ChatTemplate(tokenizer, tools, settings)
    texts = []
    for message in (None, _SAID[0], {"role": "assistant", "content": "said"}):
        try:
            prompt = template.prompt([_ASKED])
            texts.append(template.completion(prompt, [_ASKED], message) if message else prompt)
        except TemplateError:
            texts.append("")
    return texts, _kept(template)


def _kept(template: ChatTemplate) -> frozenset[str]:
    """The marks in the prompt; where no calls are written, those that a loop of them would have."""
    try:
        prompt = template.prompt(_CALLS)
        if "seen" in prompt and _LOOK["name"] in prompt:
            return frozenset(mark for mark in _MARKS if mark in prompt)
    except TemplateError:
        pass
    try:
        prompt = template.prompt(_TALK)
    except TemplateError:
        return frozenset()
    return _ALL if all(mark in prompt for mark in (_MARKS[0], _MARKS[2])) else _LOOP


def _name(marks: frozenset[str]) -> str:
    return _NAMES.get(marks, "partly preserved")
