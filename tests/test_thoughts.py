"""Prompts that write a whole thought, or open one, where the message is written without."""

import copy

import pytest
from chat_cases import chat_case
from chat_tokenizer import chat_tokenizer

from flexmask.data.renderer import render_samples
from flexmask.data.template import announce_once
from flexmask.errors import TemplateError

HEAD = "<|im_start|>assistant\n"
MESSAGE = "{{ '<|im_start|>' + m.role + '\n' + m.content }}<|im_end|>\n"


def written(added: str, case: str = "plain", message: str = MESSAGE) -> tuple[str, str]:
    """Context and completion of a case's first answer; `added` is the generation prompt."""
    tokenizer = copy.deepcopy(chat_tokenizer("qwen3"))
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{message}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{added}{{% endif %}}"
    )
    sample = render_samples(chat_case(case)[0], tokenizer)[0]
    trained = sample.loss_weights > 0
    return tokenizer.decode(sample.input_ids[~trained]), tokenizer.decode(sample.input_ids[trained])


@pytest.mark.parametrize(
    "thought",
    [
        "<|channel>thought\n<channel|>",
        "<think>\n\n</think>\n",
        "<mm:think></mm:think>",
        "[THINK][/THINK]",
        "<|START_THINKING|><|END_THINKING|>",
        "<seed:think><seed:budget>Answer now.</seed:budget>\n</seed:think>",
    ],
)
def test_a_message_is_completed_behind_the_whole_thought_of_its_prompt(thought):
    announce_once.cache_clear()
    with pytest.warns(UserWarning, match="ends its prompt with .*, which it leaves out of messa"):
        context, completion = written(HEAD + thought)
    assert context.endswith(HEAD + thought)
    assert completion == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (HEAD + "Answer: ", MESSAGE),  # no thought
        (HEAD + "<think></other>", MESSAGE),
        (HEAD + "</think>", MESSAGE),
        (HEAD + "<think></think>", MESSAGE.replace("m.content", "'<think>\n</think>' + m.content")),
        (HEAD + "<think></think>", MESSAGE.replace("<|im_start|>", "<|im_start|>a ")),
        # The thought ends the messages themselves, until one follows.
        ("", MESSAGE + "{% if loop.last %}<think></think>{% endif %}"),
    ],
)
def test_a_prompt_that_ends_otherwise_than_the_message_begins_is_refused(added, message):
    with pytest.raises(TemplateError, match="does not continue its own prompt"):
        written(added, message=message)


def test_a_message_with_thinking_is_refused_behind_the_whole_thought_of_its_prompt():
    with pytest.raises(TemplateError, match=r"message 1: .* does not continue its own prompt"):
        written(HEAD + "<think></think>", "thinking")
