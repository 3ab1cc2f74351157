"""Which turns of a conversation are trained, and how much each counts."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from flexmask import TreeCollator, render_samples
from flexmask.data.renderer import Renderer
from flexmask.demo import TOKENIZER_PATH

QUESTION = {"role": "user", "content": "What is 2 plus 2?"}
CALL = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]}
RESULT = {"role": "tool", "name": "add", "content": "4"}
ANSWER = {"role": "assistant", "content": "It is 4."}


@pytest.fixture(scope="module")
def renderer():
    return Renderer(AutoTokenizer.from_pretrained(TOKENIZER_PATH))


@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
def test_weights_of_messages_join_with_the_weighting(renderer, weighting):
    half, double = {**CALL, "weight": 0.5}, {**ANSWER, "loss_scale": 2}
    plain = renderer.samples([QUESTION, CALL, RESULT, ANSWER])
    n, m = (sample.num_trained for sample in plain)
    total = 0.5 * n + 2 * m
    expected = {
        "token": (0.5, 2),
        "turn": (0.5 / n, 2 / m),
        "conversation": (0.5 / total, 2 / total),
    }
    found = replace(renderer, weighting=weighting).samples([QUESTION, half, RESULT, double])
    for sample, same, weight in zip(found, plain, expected[weighting], strict=True):
        assert np.array_equal(sample.input_ids, same.input_ids)
        assert sample.loss_weights == pytest.approx(same.loss_weights * weight)


def test_the_last_turn_is_what_follows_the_last_user_message(renderer):
    record = [QUESTION, ANSWER, QUESTION, CALL, RESULT, ANSWER]
    rendered = replace(renderer, train_on_last_turn_only=True).render(record)
    every = {sample.key: sample for sample in renderer.samples(record)}
    assert list(every) == [1, 3, 5]
    assert [sample.key for sample in rendered.samples] == [3, 5]
    for sample in rendered.samples:
        assert np.array_equal(sample.input_ids, every[sample.key].input_ids)
        assert np.array_equal(sample.loss_weights, every[sample.key].loss_weights)
    assert rendered.conversation.trained == [3, 5]


def test_the_last_turn_is_that_of_the_last_trained_message(renderer):
    record = [QUESTION, ANSWER, QUESTION, {**ANSWER, "train": False}]
    rendered = replace(renderer, train_on_last_turn_only=True).render(record)
    assert rendered.conversation.trained == [1]


def test_a_system_message_of_the_run_gives_way_to_that_of_a_conversation(renderer):
    system = {"role": "system", "content": "You add."}
    asked = replace(renderer, system="You add.")
    expected = renderer.samples([system, QUESTION, ANSWER])
    for record in ([QUESTION, ANSWER], {"system": "You add.", "messages": [QUESTION, ANSWER]}):
        (found,) = asked.samples(record)
        assert found.key == 2
        assert np.array_equal(found.input_ids, expected[0].input_ids)
    own = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]
    assert np.array_equal(asked.samples(own)[0].input_ids, renderer.samples(own)[0].input_ids)


def test_a_collator_and_render_samples_take_the_settings_of_the_command_line(tokenizer):
    said = [
        {"speaker": "user", "content": "2+2?"},
        {"speaker": "assistant", "content": "4"},
        {"speaker": "user", "content": "+1?"},
        {"speaker": "assistant", "content": "5"},
    ]
    settings = {
        "data_columns": {"messages": "chat", "role": "speaker"},
        "system": "You teach sums.",
        "train_on_last_turn_only": True,
    }
    (sample,) = render_samples({"chat": said}, tokenizer, **settings)
    assert "You teach sums." in tokenizer.decode(sample.input_ids)
    batch = TreeCollator(tokenizer, **settings)([{"chat": said}])
    assert batch["input_ids"][0].tolist() == sample.input_ids.tolist()
