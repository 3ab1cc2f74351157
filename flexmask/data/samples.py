"""Samples: the training sequences of a conversation, as the model would meet them at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flexmask.data.checks import MarkedMessage, check_context, check_turn, mark_message
from flexmask.data.message_fields import read_tools
from flexmask.data.messages import Conversation, parse_conversation
from flexmask.data.template import ChatTemplate, Message
from flexmask.data.tokenize import encode_texts
from flexmask.errors import TemplateError
from flexmask.tree.sample import Sample

_MANY_TURNS = 4  # from here on, remembering what was rendered pays for itself


def render_samples(
    messages: Any,
    tokenizer: Any,
    *,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    on_plain: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Return one `Sample` for every trained assistant message, in order.

    The context is what the tokenizer's chat template gives at inference, the completion is what it
    writes for the message, up to its stop token. The two are tokenised apart, as at inference, and
    every completion token has weight 1. The key is the index of the message.

    Args:
        messages: a conversation in any format of `parse_conversation`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas; the conversation's own where None.
        chat_template_kwargs: settings for the template, such as {"enable_thinking": True}.
        on_plain: told the reason, where every prompt has to be rendered whole, though the template
            is one of which earlier turns are remembered; the samples are the same.

    Raises:
        DataError: the conversation is not in an accepted form.
        TemplateError: the template cannot write a message exactly; names it and the reason.
    """
    conversation = parse_conversation(messages)
    where = f"{conversation.where}: " if conversation.where else ""
    try:
        schemas = conversation.tools if tools is None else read_tools(tools)
        remember = len(conversation.trained) >= _MANY_TURNS
        template = ChatTemplate(tokenizer, schemas, chat_template_kwargs, remember=remember)
        samples = _render_turns(template, conversation)
        agrees = template.agrees(conversation.messages)
        why_plain = template.why_plain
        if not agrees:
            template = ChatTemplate(tokenizer, schemas, chat_template_kwargs)
            samples = _render_turns(template, conversation)
        check_context(template, conversation.messages[: conversation.trained[-1]])
    except TemplateError as error:
        raise TemplateError(f"{where}{error}") from error.__cause__
    if why_plain is not None and on_plain is not None:
        on_plain(why_plain)
    return samples


def _render_turns(template: ChatTemplate, conversation: Conversation) -> list[Sample]:
    """The samples of a conversation; every text is rendered before any is tokenised."""
    messages, trained = conversation.messages, conversation.trained
    marked = [mark_message(messages[index]) for index in trained]
    template.meet([*messages, *(one.message for one in marked)])
    turns = [
        _write_turn(template, messages, index, one)
        for index, one in zip(trained, marked, strict=True)
    ]
    prompts, completions = zip(*turns, strict=True)
    encoded = encode_texts(template.tokenizer, [*prompts, *completions])
    samples = []
    for index, context, completion in zip(
        trained, encoded[: len(turns)], encoded[len(turns) :], strict=True
    ):
        weights = np.repeat((0.0, 1.0), (context.size, completion.size))
        samples.append(Sample(np.concatenate((context, completion)), weights, key=index))
    return samples


def _write_turn(
    template: ChatTemplate, messages: list[Message], index: int, marked: MarkedMessage
) -> tuple[str, str]:
    """The prompt before message `index` and the completion that is the message."""
    history, message = messages[:index], messages[index]
    try:
        prompt = template.prompt(history)
        written = template.completion(prompt, history, message)
        check_turn(template, prompt, history, message, written, marked)
    except TemplateError as error:
        raise TemplateError(f"message {index}: {error}") from error.__cause__
    return prompt, written
