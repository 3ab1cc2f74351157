"""Chat templates: how a tokenizer's own template writes one turn of a conversation.

The template is the oracle. A turn is what it writes for the prompt at inference, P, and what it
then writes for the message, F without P, up to the stop token:

    P = template(messages[:i], add_generation_prompt=True)
    F = template(messages[:i + 1])

Most templates write the stop token behind the message. Some models (GLM-4) end their turn with the
role of the next one, which is a part of the next message: it is looked up there.

Some templates do not continue their own prompt. The next four steps are tried in this order, and
a turn that none of them completes is refused:

1. Adding the message changes how earlier turns are written (gpt-oss drops the thinking at a tool
   call once an answer follows). The message is taken as it is written after a history that has
   nothing to drop.
2. The prompt opens the thinking, and a message without any is written without (Nemotron). The
   message is written with an empty thought, where the template puts a thought.
3. The prompt writes a whole thought, mostly an empty one, and a message without any is written
   without (large Gemma 4, thinking off). The message is taken as it is written, behind the thought.
4. The prompt opens the thinking, and the template leaves thinking out (DeepSeek). The turn is
   composed: thinking, closing tag, the message as the template writes it.

Last, a message that is written with an empty thought though it has thinking (the answers of Kimi K2
Thinking, as opposed to its calls) gets the thinking there.

All but the first are a choice that the template does not make, so each is announced once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

from flexmask.data.jinja import CompiledTemplate, Message, check_template, template_variables
from flexmask.data.thoughts import behind_closed_thought, filled_thought, thought_to_close
from flexmask.errors import TemplateError, announce_once
from flexmask.tree.sample import common_prefix_length

_OWN_SETTINGS = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "tokenize", "tools")
}

# Settings that have models think, by the names that templates use.
_SWITCHES = {"enable_thinking", "thinking"}
_is_quiet = ContextVar("_is_quiet", default=False)
_QUESTION = {"role": "user", "content": "asked"}
_ANSWER = {"role": "assistant", "content": "said"}
_FUNCTION = {"name": "look", "arguments": {"at": "it"}}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00000", "function": _FUNCTION}],
}
RESULT: Message = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": "seen"}


class ChatTemplate:
    """The chat template of a tokenizer, with the tools and settings of one conversation.

    Messages must stay as they are while the object lives: each is prepared once.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tools: function schemas, or None.
        settings: variables for the template, such as {"enable_thinking": True}.

    Raises:
        TemplateError: the tokenizer has no template, or a setting is flexmask's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: list[dict[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_template(tokenizer)
        self.tokenizer = tokenizer
        self.tools = tools or None
        self.settings = dict(settings or {})
        for name in sorted(_OWN_SETTINGS & self.settings.keys()):
            raise TemplateError(f"chat_template_kwargs must not set {name!r}; flexmask sets it")
        self._compiled = CompiledTemplate(tokenizer, self.tools, self.settings)
        self._changed: dict[tuple[Any, int], tuple[Message, Message]] = {}

    def prompt(self, history: Sequence[Message]) -> str:
        """Return what the model is given at inference, after the messages of `history`."""
        return self._render(history, add_generation_prompt=True)

    def completion(self, prompt: str, history: Sequence[Message], message: Message) -> str:
        """Return what the model is to write as `message`, its stop token included.

        Args:
            prompt: `self.prompt(history)`.
            history: the messages before.
            message: the assistant's message.

        Raises:
            TemplateError: the template cannot write the message, or what it writes does not
                continue what it gives at inference.
        """
        full = self._render([*history, message])
        if full.startswith(prompt):
            written: str | None = full[len(prompt) :]
        else:
            written = self._continuation(self._change(_quiet, history), message)
        if written is None and not message.get("reasoning_content"):
            written = self._with_empty_thought(history, message)
            if written is None:
                written = self._behind_closed_thought(prompt, history, full)
        if written is None:
            written = _composed(prompt, full, message)
        if written is None:
            raise TemplateError(self._describe_split(prompt, full, history, message))
        return self._up_to_stop(_filled(prompt, written, message), history, message, full)

    def stop_token(self, completion: str) -> str | None:
        """Return the special token that `completion` ends with, the longest, or None."""
        tokens = special_tokens(self.tokenizer, len(self.tokenizer))
        return max(filter(completion.endswith, tokens), key=len, default=None)

    def thinking_remedy(self, history: Sequence[Message], message: Message) -> str | None:
        """Return the setting with which the template writes the thinking of `message`, or None."""
        thinking = message.get("reasoning_content", "").strip()
        for name in _SWITCHES & template_variables(self.tokenizer, self.tools):
            if not thinking or self.settings.get(name) is True:
                continue
            switched = ChatTemplate(self.tokenizer, self.tools, {**self.settings, name: True})
            with suppress(TemplateError), unannounced():
                if thinking in switched.completion(switched.prompt(history), history, message):
                    return (
                        f"this message has thinking: set chat_template_kwargs={{{name!r}: True}}, "
                        f"""on the command line --chat_template_kwargs '{{"{name}": true}}'"""
                    )
        return None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        # Arguments are objects, and JSON text for a template that joins strings (DeepSeek-V3).
        render = partial(self._compiled.render, add_generation_prompt=add_generation_prompt)
        try:
            try:
                return render(messages)
            except TypeError:
                if not any("tool_calls" in message for message in messages):
                    raise
                return render(self._change(_with_json_arguments, messages))
        except Exception as error:  # a template is a foreign program: it raises what it likes
            reason = str(error) or type(error).__name__
            raise TemplateError(
                f"the chat template cannot write it: {reason}; change the data or the template"
            ) from error

    def _change(
        self, change: Callable[[Message], Message], messages: Sequence[Message]
    ) -> list[Message]:
        """Return each message changed; the same object for the same object."""
        for message in messages:
            if (change, id(message)) not in self._changed:
                self._changed[change, id(message)] = (message, change(message))
        return [self._changed[change, id(message)][1] for message in messages]

    def _continuation(self, history: Sequence[Message], message: Message) -> str | None:
        prompt, full = self.prompt(history), self._render([*history, message])
        return full[len(prompt) :] if full.startswith(prompt) else None

    def _with_empty_thought(self, history: Sequence[Message], message: Message) -> str | None:
        thought = "flexmaskthought"
        written = self._continuation(history, {**message, "reasoning_content": thought})
        if written is None or written.count(thought) != 1:
            return None
        _announce(
            "the chat template opens the thinking in its prompt, but not in a message without "
            "thinking: such messages are completed with an empty thought"
        )
        return written.replace(thought, "")

    def _behind_closed_thought(
        self, prompt: str, history: Sequence[Message], full: str
    ) -> str | None:
        found = behind_closed_thought(prompt, lambda: self._render(history), full)
        if found is None:
            return None
        thought, written = found
        _announce(
            f"the chat template ends its prompt with {thought!r}, which it leaves out of messages: "
            "completions are composed as what it writes behind it"
        )
        return written

    def _describe_split(
        self, prompt: str, full: str, history: Sequence[Message], message: Message
    ) -> str:
        same = common_prefix_length(prompt, full)
        shown = slice(max(same - 20, 0), same + 40)
        remedy = self.thinking_remedy(history, message) or "use a template that does"
        return (
            "the chat template does not continue its own prompt: the prompt has "
            f"{prompt[shown]!r} where the message has {full[shown]!r}; {remedy}"
        )

    def _up_to_stop(
        self, written: str, history: Sequence[Message], message: Message, full: str
    ) -> str:
        text = written.rstrip()
        stop = self.stop_token(text)
        if stop is None:
            return written + self._next_role(message)
        earlier = text.removesuffix(stop).rstrip()
        if stop == self.tokenizer.eos_token and self.stop_token(earlier):
            before = self._render(history)
            if before.rstrip().endswith(stop) and before.count(stop) == full.count(stop):
                return earlier  # this token ends every rendered text, not the turn (Phi-3)
        return text

    def _next_role(self, message: Message) -> str:
        """Return the special token, and white space before it, with which the next turn begins.

        That is a user's after an answer, a tool's after a call; "" where it begins with none, or
        with that of all text (BOS).
        """
        reply, following = (CALL, RESULT) if "tool_calls" in message else (_ANSWER, _QUESTION)
        try:
            written = self._render([_QUESTION, reply])
            text = self._render([_QUESTION, reply, following])
        except TemplateError:
            written = text = ""
        rest = text[len(written) :] if text.startswith(written) else ""
        begun = rest.lstrip()
        tokens = special_tokens(self.tokenizer, len(self.tokenizer))
        token = max(filter(begun.startswith, tokens), key=len, default="")
        if token in ("", self.tokenizer.bos_token):
            _announce(
                "the chat template ends assistant messages without a special token: "
                "the end of a turn is not trained"
            )
            return ""
        _announce(
            "the chat template ends assistant messages with the role of the next turn: its "
            "special token is trained as the stop token, so generation has to stop there "
            "(eos_token_id of the generation settings)"
        )
        return rest[: len(rest) - len(begun)] + token


def _composed(prompt: str, full: str, message: Message) -> str | None:
    found = thought_to_close(prompt, full)
    if found is None:
        return None
    closing, written = found
    _announce(
        "the chat template opens the thinking in its prompt and leaves it out of messages: "
        f"completions are composed as thinking, {closing!r}, answer"
    )
    thinking = message.get("reasoning_content", "")
    return (thinking.strip("\n") if closing.startswith("\n") else thinking) + closing + written


def _filled(prompt: str, written: str, message: Message) -> str:
    thinking = message.get("reasoning_content", "")
    filled = filled_thought(prompt, written, thinking) if thinking.strip() else None
    if filled is None:
        return written
    _announce(
        "the chat template writes an empty thought for messages that have thinking: completions "
        "are composed with the thinking in it"
    )
    return filled


def _with_json_arguments(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls", []):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else message


def _quiet(message: Message) -> Message:
    """Return a message without what templates drop from earlier turns: thinking, words at calls."""
    quiet = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**quiet, "content": ""} if "tool_calls" in message else quiet


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any, num_tokens: int) -> tuple[str, ...]:
    """Return the special tokens of a tokenizer; `num_tokens` notices tokens added later."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


@contextmanager
def unannounced() -> Iterator[None]:
    """A block in which nothing is announced: what it renders is not the caller's data."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def _announce(text: str) -> None:
    if not _is_quiet.get():
        announce_once(text)
