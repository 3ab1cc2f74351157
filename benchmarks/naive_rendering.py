"""The oracle of fast rendering: every prompt rendered and tokenised whole, one by one."""

from typing import Any

import numpy as np

from flexmask.data.checks import check_context, check_turn, mark_message
from flexmask.data.message_fields import read_tools
from flexmask.data.messages import parse_conversation
from flexmask.data.template import ChatTemplate
from flexmask.errors import TemplateError
from flexmask.tree.sample import Sample


def naive_samples(
    messages: Any,
    tokenizer: Any,
    tools: Any = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Sample]:
    """What `render_samples` has to give."""
    conversation = parse_conversation(messages)
    template = ChatTemplate(tokenizer, read_tools(tools), chat_template_kwargs)
    samples = []
    for index in conversation.trained:
        history, message = conversation.messages[:index], conversation.messages[index]
        try:
            prompt = template.prompt(history)
            written = template.completion(prompt, history, message)
            marked = mark_message(message)
            check_turn(template, prompt, history, message, written, marked)
        except TemplateError as error:
            raise TemplateError(f"message {index}: {error}") from error.__cause__
        context = tokenizer.encode(prompt, add_special_tokens=False)
        completion = tokenizer.encode(written, add_special_tokens=False)
        weights = np.repeat((0.0, 1.0), (len(context), len(completion)))
        samples.append(Sample(context + completion, weights, key=index))
    check_context(template, conversation.messages[: conversation.trained[-1]])
    return samples
