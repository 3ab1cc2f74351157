"""Samples, and conversations rendered into them."""

import copy
import json
import warnings

import numpy as np
import pytest
from chat_cases import TOOL, chat_case
from chat_tokenizer import chat_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmask import Sample, render_samples
from flexmask.data.files import read_conversations
from flexmask.data.messages import parse_conversation
from flexmask.data.template import announce_once
from flexmask.errors import DataError, TemplateError


def texts(sample, tokenizer):
    """Context and completion as text."""
    trained = sample.loss_weights > 0
    return tokenizer.decode(sample.input_ids[~trained]), tokenizer.decode(sample.input_ids[trained])


def test_sample_takes_lists_and_arrays():
    for ids, weights in (([1, 2, 3], [0, 1, 1]), (np.array([1, 2, 3]), np.array([0.0, 1, 1]))):
        sample = Sample(ids, weights, key="k")
        assert sample.input_ids.dtype == np.int64
        assert sample.loss_weights.dtype.kind == "f"
        assert (len(sample), sample.num_trained, sample.key) == (3, 2, "k")


def test_first_token_is_never_a_target():
    assert Sample([1, 2], [1, 1]).num_trained == 1


@pytest.mark.parametrize(
    ("ids", "weights", "reason"),
    [
        ([], [], "input_ids is empty"),
        ([1, 2], [1], "one value per token, got 1 for 2 tokens"),
        ([[1]], [1], r"one-dimensional, got shape \(1, 1\)"),
        ([1.5], [1], "input_ids must be integers, got float64"),
        ([-1], [1], "at least 0, got -1"),
        (np.array([2**63], np.uint64), [1], "int64 of at least 0, got 9223372036854775808"),
        ([1, 2], [0, -1], r"finite and at least 0, got -1\.0"),
        ([1, 2], [0, float("nan")], "finite and at least 0, got nan"),
        ([1, 2], [0, 1e39], r"weight of token 1 must be 0 or between 1e-30 and 1e\+30, got 1e\+39"),
        ([1, 2, 3], [0, 1, 1e-45], "weight of token 2 must be 0 or between .*, got 1e-45"),
    ],
)
def test_rejects_bad_sample(ids, weights, reason):
    with pytest.raises(DataError, match=f"^sample 3: .*{reason}"):
        Sample(ids, weights, key=3)


def test_every_answer_is_a_sample_and_earlier_thinking_is_gone():
    tokenizer = chat_tokenizer("qwen3")
    messages, _ = chat_case("thinking")
    first, second = render_samples(messages, tokenizer)
    assert (first.key, second.key) == (1, 3)
    context, completion = texts(second, tokenizer)
    assert "Two and two." not in context
    assert "It is 4." in context
    assert completion == "<think>\nOne more\nthan four.\n</think>\n\nThat makes 5.<|im_end|>"


def test_thinking_is_kept_through_tool_calls():
    tokenizer = chat_tokenizer("qwen3")
    messages, tools = chat_case("thinking+tools")
    _, answer, later = render_samples(messages, tokenizer, tools=tools)
    assert "I should call it." in texts(answer, tokenizer)[0]
    assert "I should call it." not in texts(later, tokenizer)[0]


def test_untrained_message_is_context_only():
    tokenizer = chat_tokenizer("qwen3")
    messages, _ = chat_case("thinking")
    whole = render_samples(messages, tokenizer)
    messages[1]["train"] = False
    (sample,) = render_samples(messages, tokenizer)
    assert sample.key == 3
    assert (sample.input_ids == whole[1].input_ids).all()


def test_a_prompt_keeps_its_tokens_where_the_completion_would_merge_with_them():
    tokenizer = copy.deepcopy(chat_tokenizer("cohere"))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "he end"}]
    plain = "{{ messages[0].content }} t{% if messages | length > 1 %}{{ messages[1].content }}"
    tokenizer.chat_template = plain + "{% endif %}"
    announce_once.cache_clear()
    with pytest.warns(UserWarning, match="the end of a turn is not trained"):
        (sample,) = render_samples(messages, tokenizer)
    apart = tokenizer.encode("x t") + tokenizer.encode("he end")
    assert sample.input_ids.tolist() == apart != tokenizer.encode("x the end")


@pytest.mark.parametrize("ending", ["\n", ": ", "</s>"])
@pytest.mark.parametrize("marks", ["always", "first", "legacy"])
def test_completion_does_not_begin_like_a_text(marks, ending):
    """SentencePiece writes a space before a text: before a completion only where one stands."""
    words = ["▁", *"\nabcdefghijklmnopqrstuvwxyz.:", "Green", "▁Green", "▁is", "▁it"]
    vocabulary = [(word, -float(len(words) + 1 - len(word))) for word in ["?", *words]]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    if marks == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=marks, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + eos_token if m.role == 'assistant' else m.content }}"
        "{{ ENDING if m.role == 'user' }}{% endfor %}".replace("ENDING", repr(ending))
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Green it is"}]
    (sample,) = render_samples(messages, tokenizer)
    context, completion = (
        tokenizer.convert_ids_to_tokens(sample.input_ids[trained])
        for trained in (sample.loss_weights == 0, sample.loss_weights > 0)
    )
    begins = ending == "</s>" and marks != "first"  # each piece between control tokens is marked
    assert completion == ["▁Green" if begins else "Green", "▁it", "▁is", "</s>"]
    assert context == tokenizer.tokenize("hi" + ending)


def test_every_accepted_format_gives_the_same_samples():
    tokenizer = chat_tokenizer("qwen3")
    question = {"role": "user", "content": "What is 2 plus 2?"}
    tagged = {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4"}
    fielded = {"role": "assistant", "content": "4", "thinking": "Two."}
    parts = [{"type": "thinking", "thinking": "Two."}, {"type": "text", "text": "4"}]
    shared = [{"from": "human", "value": question["content"]}]
    records = [
        [question, tagged],
        {"messages": [question, fielded], "tools": [TOOL]},
        {"messages": [question, {"role": "assistant", "content": parts}]},
        {"conversations": [*shared, {"from": "gpt", "value": tagged["content"]}]},
        parse_conversation([question, fielded]),
    ]
    samples = [render_samples(record, tokenizer, tools=[TOOL])[0] for record in records]
    assert len({sample.input_ids.tobytes() for sample in samples}) == 1


def test_tools_of_the_conversation_are_used_unless_given():
    tokenizer = chat_tokenizer("qwen3")
    messages, tools = chat_case("tools")
    own = render_samples({"messages": messages, "tools": tools}, tokenizer)
    given = render_samples(messages, tokenizer, tools=tools)
    none = render_samples({"messages": messages, "tools": tools}, tokenizer, tools=[])
    assert [len(one) for one in own] == [len(one) for one in given]
    assert len(none[0]) < len(own[0])


def test_settings_of_the_conversation_come_before_those_given():
    tokenizer = chat_tokenizer("qwen3")
    messages, _ = chat_case("plain")
    record = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    context, _ = texts(render_samples(record, tokenizer)[0], tokenizer)
    assert context.endswith("assistant\n<think>\n\n</think>\n\n")
    switched = render_samples(record, tokenizer, chat_template_kwargs={"enable_thinking": True})
    assert texts(switched[0], tokenizer)[0] == context
    assert not texts(render_samples(messages, tokenizer)[0], tokenizer)[0].endswith("\n\n")


@pytest.mark.parametrize("option", ["tools", "chat_template_kwargs"])
def test_options_that_are_nested_too_deep_are_refused(option):
    deep = {}
    for _ in range(1500):
        deep = {"a": deep}
    given = {"tools": [{"name": "f", "parameters": deep}], "chat_template_kwargs": deep}[option]
    with pytest.raises(DataError, match=f"^{option} is nested too deep"):
        render_samples(chat_case("plain")[0], chat_tokenizer("qwen3"), **{option: given})


def test_messages_are_not_changed():
    messages, tools = chat_case("system+thinking+tools")
    before = repr((messages, tools))
    render_samples(messages, chat_tokenizer("gptoss"), tools=tools)
    assert repr((messages, tools)) == before


def test_announcements_are_made_once():
    messages, _ = chat_case("thinking")
    announce_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            render_samples(messages, chat_tokenizer("deepseek_r1_distill"))
    (warning,) = caught
    assert "leaves it out of messages" in str(warning.message)


def calls(*names):
    """A record with a call for each name, whose only argument and only parameter is called so."""
    calls = [{"name": name, "arguments": {name: 1}} for name in names]
    tools = [
        {"name": name, "parameters": {"properties": {name: {"type": "integer"}}}} for name in names
    ]
    asked = {"role": "user", "content": "Now."}
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"messages": [asked, called], "tools": tools}


def test_rows_of_datasets_are_rendered_like_the_records_they_were_made_from(tokenizer):
    records = [calls("day", "hour"), {**calls("day"), "id": "second"}]
    for record, row in zip(records, Dataset.from_list(records), strict=True):
        assert row != record  # filled up with None
        whole = render_samples(parse_conversation(record, keep_nulls=True), tokenizer)
        apart = render_samples(row["messages"], tokenizer, tools=row["tools"])
        rows = zip(whole, render_samples(row, tokenizer), apart, strict=True)
        for samples in rows:
            assert len({texts(sample, tokenizer) for sample in samples}) == 1


def test_a_null_that_is_meant_is_kept(tokenizer, tmp_path):
    record = calls("day")
    record["messages"][1]["tool_calls"][0]["arguments"]["day"] = None
    (tmp_path / "calls.jsonl").write_text(json.dumps(record))
    (read,) = read_conversations(tmp_path / "calls.jsonl")
    for conversation in (read, parse_conversation(record, keep_nulls=True)):
        (sample,) = render_samples(conversation, tokenizer)
        assert '{"day": null}' in texts(sample, tokenizer)[1]


def test_errors_begin_with_the_place_of_the_conversation():
    messages, _ = chat_case("thinking")
    conversation = parse_conversation(messages, "data.jsonl:17")
    with pytest.raises(TemplateError, match=r"^data.jsonl:17: message 1: .* drops or changes"):
        render_samples(conversation, chat_tokenizer("llama3"))


def test_rejects_conversation_without_a_trained_message():
    messages = [{**message, "train": False} for message in chat_case("plain")[0]]
    with pytest.raises(DataError, match="every assistant message has train: false"):
        render_samples(messages, chat_tokenizer("qwen3"))
