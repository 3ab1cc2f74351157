"""Samples: the training sequences of a conversation, as the model would meet them at inference."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmask.errors import DataError, TemplateError
from flexmask.message_fields import read_tools
from flexmask.messages import Conversation, parse_conversation
from flexmask.rendering.checks import MarkedMessage, check_context, check_turn, mark_message
from flexmask.rendering.templates import ChatTemplate, Message
from flexmask.rendering.text_pieces import encode_texts

_MANY_TURNS = 4  # from here on, remembering what was rendered pays for itself


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training sequence: context and completion, with a loss weight for every token.

    Attributes:
        input_ids: token ids, int64 [n], at least one; lists and arrays are accepted.
        loss_weights: float64 [n], finite, at least 0; token i is a target where its weight is
            above 0. Nothing predicts the first token, so its weight counts for nothing.
        key: anything hashable that tells the caller which sample this is, such as a turn number.

    Raises:
        DataError: the arrays are empty, differ in length, or hold a value outside their range.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray
    key: Hashable = None

    def __init__(
        self,
        input_ids: Sequence[int] | np.ndarray,
        loss_weights: Sequence[float] | np.ndarray,
        key: Hashable = None,
    ) -> None:
        ids = _as_vector(input_ids, "input_ids", key)
        weights = _as_vector(loss_weights, "loss_weights", key).astype(np.float64)
        if ids.size == 0:
            raise DataError(f"{_name(key)}: input_ids is empty; a sample needs at least one token")
        if not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"{_name(key)}: input_ids must be integers, got {ids.dtype}")
        if ids.size != weights.size:
            raise DataError(
                f"{_name(key)}: loss_weights must have one value per token, "
                f"got {weights.size} for {ids.size} tokens"
            )
        if ids.min() < 0 or ids.max() > np.iinfo(np.int64).max:
            bad_id = ids[(ids < 0) | (ids > np.iinfo(np.int64).max)][0]
            raise DataError(f"{_name(key)}: token ids must be int64 of at least 0, got {bad_id}")
        if not (np.isfinite(weights).all() and weights.min() >= 0):
            bad = weights[~(np.isfinite(weights) & (weights >= 0))][0]
            raise DataError(f"{_name(key)}: loss weights must be finite and at least 0, got {bad}")
        object.__setattr__(self, "input_ids", ids.astype(np.int64))
        object.__setattr__(self, "loss_weights", weights)
        object.__setattr__(self, "key", key)

    def __len__(self) -> int:
        return self.input_ids.size

    @property
    def num_trained(self) -> int:
        """Number of tokens that carry loss: those with a weight above 0, the first excepted."""
        return int(np.count_nonzero(self.loss_weights[1:]))


def _as_vector(values: Any, name: str, key: Hashable) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{_name(key)}: {name} must be one-dimensional, got shape {array.shape}")
    return array


def _name(key: Hashable) -> str:
    return "sample" if key is None else f"sample {key!r}"


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
