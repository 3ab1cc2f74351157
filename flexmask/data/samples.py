"""Samples: the training sequences of a conversation, as the model would meet them at inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np

from flexmask.data.checks import check_turn
from flexmask.data.messages import Conversation
from flexmask.data.template import ChatTemplate, Message
from flexmask.data.tokenize import encode_completion, encode_texts
from flexmask.errors import DataError, TemplateError
from flexmask.tree.sample import Sample

Weighting = Literal["token", "turn", "conversation"]


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
    return scale_samples(samples, [1 / total if total else 1.0 for total in totals])


def scale_samples(samples: Sequence[Sample], factors: Sequence[float]) -> list[Sample]:
    """The samples with the loss weights of each multiplied by its factor."""
    return [
        Sample(sample.input_ids, sample.loss_weights * factor, sample.key)
        for sample, factor in zip(samples, factors, strict=True)
    ]


def write_turns(template: ChatTemplate, conversation: Conversation) -> list[tuple[str, str]]:
    """The prompt before each trained message, and the completion that is the message.

    Raises:
        TemplateError: the template cannot write a message exactly; names it and the reason.
    """
    messages = conversation.messages
    turns = []
    for index in conversation.trained:
        with _at_message(index):
            turns.append(_write_turn(template, messages[:index], messages[index]))
    return turns


def encode_turns(
    template: ChatTemplate, keys: Sequence[int], turns: Sequence[tuple[str, str]]
) -> list[Sample]:
    """The sample of each turn, all texts tokenised together; `keys` become those of the samples.

    Raises:
        TemplateError: the tokens do not spell what the template writes.
    """
    texts = [text for prompt, written in turns for text in (prompt, prompt + written)]
    encoded = encode_texts(template.tokenizer, texts)
    samples = []
    for key, (_, written), context, whole in zip(
        keys, turns, encoded[::2], encoded[1::2], strict=True
    ):
        with _at_message(key):
            completion = encode_completion(template.tokenizer, context, whole, written)
        weights = np.repeat((0.0, 1.0), (context.size, completion.size))
        samples.append(Sample(np.concatenate((context, completion)), weights, key=key))
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
