"""Samples: the training sequences of a conversation, as the model would meet them at inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np

from flexmask.data.checks import check_context, check_turn
from flexmask.data.messages import Conversation, parse_conversation
from flexmask.data.template import ChatTemplate, Message
from flexmask.data.tokenize import encode_completion, encode_texts
from flexmask.data.tool_calls import read_tools
from flexmask.errors import DataError, TemplateError
from flexmask.tree.sample import Sample

Weighting = Literal["token", "turn", "conversation"]


def render_samples(
    messages: Any,
    tokenizer: Any,
    *,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """Return one `Sample` for every trained assistant message, in order.

    The context is what the tokenizer's chat template gives at inference, the completion is what it
    writes for the message, up to its stop token. The tokens of the context are those of inference,
    and the completion continues them: together they spell what the template writes. Every token of
    the completion has weight 1. The key is the index of the message.

    Args:
        messages: a conversation in any format of `parse_conversation`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function schemas; the conversation's own where None.
        chat_template_kwargs: settings for the template, such as {"enable_thinking": True}; those
            that the conversation has itself come first.

    Raises:
        DataError: the conversation is not in an accepted form.
        TemplateError: the template cannot write a message exactly; names it and the reason.
    """
    conversation = parse_conversation(messages)
    where = f"{conversation.where}: " if conversation.where else ""
    try:
        schemas = conversation.tools if tools is None else read_tools(tools)
        template = ChatTemplate(tokenizer, schemas, conversation.settings(chat_template_kwargs))
        samples = _render_turns(template, conversation)
        check_context(template, conversation.messages[: conversation.trained[-1]])
    except TemplateError as error:
        raise TemplateError(f"{where}{error}") from error.__cause__
    return samples


def check_weighting(weighting: Weighting) -> None:
    """Raise DataError for an unknown weighting."""
    if weighting not in get_args(Weighting):
        raise DataError(f"weighting must be one of {get_args(Weighting)}, got {weighting!r}")


def weigh_samples(samples: Sequence[Sample], weighting: Weighting = "token") -> list[Sample]:
    """The samples of one conversation with their loss weights scaled.

    Args:
        samples: all samples of one conversation.
        weighting: "token": each trained token counts as much as its weight says (once, unless
            told otherwise); "turn": the weights of each sample add up to 1; "conversation": those
            of all samples together add up to 1.

    Raises:
        DataError: an unknown weighting.
    """
    check_weighting(weighting)
    if weighting == "token":
        return list(samples)
    totals = [float(sample.loss_weights[1:].sum()) for sample in samples]
    if weighting == "conversation":
        totals = [sum(totals)] * len(totals)
    return [
        Sample(s.input_ids, s.loss_weights / total if total else s.loss_weights, s.key)
        for s, total in zip(samples, totals, strict=True)
    ]


def _render_turns(template: ChatTemplate, conversation: Conversation) -> list[Sample]:
    """The samples of a conversation; every text is rendered before any is tokenised."""
    messages, trained = conversation.messages, conversation.trained
    turns = []
    for index in trained:
        with _at_message(index):
            turns.append(_write_turn(template, messages[:index], messages[index]))
    texts = [text for prompt, written in turns for text in (prompt, prompt + written)]
    encoded = encode_texts(template.tokenizer, texts)
    samples = []
    for index, (_, written), context, whole in zip(
        trained, turns, encoded[::2], encoded[1::2], strict=True
    ):
        with _at_message(index):
            completion = encode_completion(template.tokenizer, context, whole, written)
        weights = np.repeat((0.0, 1.0), (context.size, completion.size))
        samples.append(Sample(np.concatenate((context, completion)), weights, key=index))
    return samples


def _write_turn(
    template: ChatTemplate, history: list[Message], message: Message
) -> tuple[str, str]:
    """The prompt after `history` and the completion that is the message."""
    prompt = template.prompt(history)
    written = template.completion(prompt, history, message)
    check_turn(template, prompt, history, message, written)
    return prompt, written


@contextmanager
def _at_message(index: int) -> Iterator[None]:
    """Name the message in a TemplateError that is raised inside."""
    try:
        yield
    except TemplateError as error:
        raise TemplateError(f"message {index}: {error}") from error.__cause__
