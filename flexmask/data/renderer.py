"""Conversations rendered into samples and trees, all in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from os import PathLike
from typing import Any, Literal, get_args

from flexmask.data.checks import check_context
from flexmask.data.jinja import CLOCK, check_settings
from flexmask.data.messages import (
    Conversation,
    last_turn_only,
    parse_conversation,
    with_system,
)
from flexmask.data.records import check_columns
from flexmask.data.samples import (
    Weighting,
    check_weighting,
    encode_turns,
    scale_samples,
    weigh_samples,
    write_turns,
)
from flexmask.data.template import ChatTemplate
from flexmask.data.thinking import (
    ThinkingHistory,
    ThinkingRule,
    check_history,
    check_thinking_history,
    thinking_rule,
)
from flexmask.data.tool_calls import read_tools
from flexmask.data.unused import unused_keys
from flexmask.data.values import check_depth, read_text, without_nulls
from flexmask.errors import DataError, LeftOutError, TemplateError
from flexmask.tree.build import build_tree
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree

EmptyThinking = Literal["template", "skip_conversation"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What became of one conversation.

    Attributes:
        conversation: the conversation as it was rendered.
        samples: one for each trained assistant message, weighted, in order.
        num_empty_thoughts: samples of messages without thinking whose completion begins with an
            empty thought, because the chat template writes one.
        unused_keys: keys of the conversation that nothing is made of.
    """

    conversation: Conversation
    samples: list[Sample]
    num_empty_thoughts: int
    unused_keys: tuple[str, ...]

    @property
    def tree(self) -> PrefixTree:
        """The prefix tree of the samples."""
        return build_tree(self.samples)


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders conversations, all in the same way.

    Attributes:
        tokenizer: a Hugging Face tokenizer with a chat template.
        weighting: as in `weigh_samples`; with "turn", the weights of a message add up to the
            `weight` that it has itself.
        chat_template_kwargs: settings for the chat template, such as {"enable_thinking": True}.
        thinking_history: what becomes of the thinking of earlier turns. "template": what the
            template does; "interleaved": dropped at a new user message, kept until then;
            "preserved": all of it is kept. The last two set the template's own setting for it, and
            a conversation that is not written so is refused.
        empty_thinking: where the template writes an empty thought for a trained message without
            thinking: "template" trains it, "skip_conversation" leaves the conversation out.
        date: the day that a template writes which writes today's, such as "2026-01-31"; today where
            None.
        train_on_last_turn_only: whether only what follows the last user message before the last
            trained one is trained, all steps of a tool loop.
        system: text of a system message for conversations that have none of their own.
        data_columns: the `columns` of `parse_conversation`, for data that are read for this.
    """

    tokenizer: Any
    weighting: Weighting = "token"
    chat_template_kwargs: Mapping[str, Any] | None = None
    thinking_history: ThinkingHistory = "template"
    empty_thinking: EmptyThinking = "template"
    date: str | None = None
    train_on_last_turn_only: bool = False
    system: str | None = None
    data_columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, (str, PathLike)):
            raise DataError(
                "tokenizer must be a Hugging Face tokenizer, got the name "
                f"{str(self.tokenizer)!r}; load it with AutoTokenizer.from_pretrained"
            )
        check_weighting(self.weighting)
        check_thinking_history(self.thinking_history)
        if self.empty_thinking not in get_args(EmptyThinking):
            raise DataError(
                f"empty_thinking must be one of {get_args(EmptyThinking)}, "
                f"got {self.empty_thinking!r}"
            )
        _read_date(self.date)
        read_text(self.system, "system")
        check_columns(self.data_columns)
        if self.chat_template_kwargs:
            check_depth(self.chat_template_kwargs, "chat_template_kwargs")
            check_settings(self.tokenizer, self.chat_template_kwargs)

    @property
    def reads_clock(self) -> bool:
        """Whether the chat template can write today's date."""
        return CLOCK in str(getattr(self.tokenizer, "chat_template", None))

    def dated(self, date: str | None = None) -> Renderer:
        """The same with its date settled: its own, else `date`, else today; None without clock."""
        today = datetime.now().date().isoformat()
        return replace(self, date=(self.reads_clock and (self.date or date or today)) or None)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides on the samples beside the tokenizer, as plain data."""
        settings = {name: getattr(self, name) for name in RENDERING}
        return settings | {"chat_template_kwargs": dict(self.chat_template_kwargs or {})}

    def thinking(self, conversation: Conversation | None = None) -> ThinkingRule:
        """What the template does with thinking; for a conversation that has settings of its own."""
        tools, settings = None, self.chat_template_kwargs
        if conversation is not None:
            tools, settings = conversation.tools, conversation.settings(settings)
        return thinking_rule(self.tokenizer, tools, settings, self.thinking_history)

    @property
    def thinking_text(self) -> str:
        """What the template does with thinking, for people; with tools too where that differs."""
        without, with_tools = Conversation([]), Conversation([], [{}])
        texts = [str(self.thinking(kind)) for kind in (without, with_tools)]
        return "; with tools: ".join(dict.fromkeys(texts))

    def template(self, conversation: Conversation) -> ChatTemplate:
        """The chat template for a conversation."""
        settings = conversation.settings(self.chat_template_kwargs)
        settings |= self.thinking(conversation).flag
        if self.date is not None and self.reads_clock:
            settings[CLOCK] = _read_date(self.date).strftime
        return ChatTemplate(self.tokenizer, conversation.tools, settings)

    def conversation(self, record: Any) -> Conversation:
        """The conversation of a record in any format of `parse_conversation`, as it is rendered."""
        conversation = parse_conversation(record, columns=self.data_columns)
        if self.system:
            conversation = with_system(conversation, self.system)
        if self.train_on_last_turn_only:
            conversation = last_turn_only(conversation)
        return conversation

    def render(self, conversation: Any) -> Rendered:
        """The samples of a conversation, in any format of `parse_conversation`.

        Raises:
            DataError: the conversation is not in an accepted form.
            TemplateError: the template cannot write a message exactly, or not as asked.
            LeftOutError: `empty_thinking` leaves it out.
        """
        conversation = self.conversation(conversation)
        where = f"{conversation.where}: " if conversation.where else ""
        messages, trained = conversation.messages, conversation.trained
        try:
            template = self.template(conversation)
            turns = write_turns(template, conversation)
            check_context(template, messages[: trained[-1]])
            check_history(template, messages, trained, self.thinking_history)
            samples = encode_turns(template, trained, turns)
        except TemplateError as error:
            raise TemplateError(f"{where}{error}") from error.__cause__
        rule = self.thinking(conversation)
        empty = [
            index
            for index, (_, written) in zip(trained, turns, strict=True)
            if rule.has_empty_thought(messages[index], written)
        ]
        if empty and self.empty_thinking == "skip_conversation":
            raise LeftOutError(
                f"{where}message {empty[0]} has no thinking, and the chat template writes an empty "
                "thought for it; left out by empty_thinking='skip_conversation'"
            )
        weights = [messages[index].get("weight", 1.0) for index in trained]
        if self.weighting == "turn":
            samples = scale_samples(weigh_samples(samples, "turn"), weights)
        else:
            samples = weigh_samples(scale_samples(samples, weights), self.weighting)
        return Rendered(
            conversation,
            samples,
            len(empty),
            unused_keys(conversation, self.tokenizer),
        )

    def samples(self, conversation: Any) -> list[Sample]:
        """The weighted samples of a conversation; see `render`."""
        return self.render(conversation).samples

    def tree(self, conversation: Any) -> PrefixTree:
        """The prefix tree of these samples."""
        return self.render(conversation).tree


# What decides on the samples of a conversation beside the tokenizer.
RENDERING = tuple(field.name for field in fields(Renderer) if field.name != "tokenizer")


def render_samples(
    messages: Any,
    tokenizer: Any,
    *,
    tools: list[dict[str, Any]] | None = None,
    **rendering: Any,
) -> list[Sample]:
    """Return one `Sample` for every trained assistant message, in order.

    The context is what the tokenizer's chat template gives at inference, the completion is what it
    writes for the message, up to its stop token. The tokens of the context are those of inference,
    and the completion continues them: together they spell what the template writes. Every token of
    the completion has the weight of the message, or 1. The key is the index of the message.

    Args:
        messages: a conversation in any format of `parse_conversation`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas; the conversation's own where None.
        rendering: attributes of `Renderer`: `chat_template_kwargs` (those that the conversation has
            itself come first), `thinking_history`, `date`, `system` and so on.

    Raises:
        DataError: the conversation is not in an accepted form.
        TemplateError: the template cannot write a message exactly; names it and the reason.
    """
    renderer = Renderer(tokenizer, **rendering)
    conversation = parse_conversation(messages, columns=renderer.data_columns)
    if tools is not None:
        check_depth(tools, "tools")
        conversation = replace(conversation, tools=read_tools(without_nulls(tools)))
    return renderer.samples(conversation)


def _read_date(date: str | None) -> datetime:
    try:
        return datetime.now() if date is None else datetime.fromisoformat(date)
    except (TypeError, ValueError):
        raise DataError(f"date must be a day such as '2026-01-31', got {date!r}") from None
