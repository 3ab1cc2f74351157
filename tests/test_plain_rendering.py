"""Conversations that cannot be rendered with what is remembered: exact, counted, and said."""

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.naive_rendering import naive_samples
from flexmask import TreeCollator, render_samples
from flexmask.data.memo import TurnRenderer, num_listed
from flexmask.data.plain import RenderedPlainly, reason_of
from flexmask.data.prepare import prepare
from flexmask.demo import CONFIG_PATH, TOKENIZER_PATH
from flexmask.tools.cli import main

JOINS_STRINGS = (  # as in DeepSeek-V3: arguments that are objects are a TypeError
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TYPE_ERROR = 'TypeError: can only concatenate str (not "dict") to str'


def chat(number, with_call=False):
    """Four turns; the second calls a tool, or does not."""
    messages = []
    for turn in range(4):
        message = {"role": "assistant", "content": f"It is {turn}."}
        messages += [{"role": "user", "content": f"What is {number} + {turn}?"}, message]
        if with_call and turn == 1:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": number}}}
            message["tool_calls"] = [call]
            messages.append({"role": "tool", "name": "add", "content": "four"})
    return messages


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tokenizer.chat_template = JOINS_STRINGS
    assert num_listed(JOINS_STRINGS)
    return tokenizer


def as_lists(samples):
    return [(s.key, s.input_ids.tolist(), s.loss_weights.tolist()) for s in samples]


def test_a_template_that_fails_on_objects_is_rendered_plainly_and_says_why(tokenizer):
    reasons = []
    samples = render_samples(chat(1, with_call=True), tokenizer, on_plain=reasons.append)
    assert as_lists(samples) == as_lists(naive_samples(chat(1, with_call=True), tokenizer))
    assert reasons == [TYPE_ERROR]
    render_samples(chat(1), tokenizer, on_plain=reasons.append)
    assert len(reasons) == 1


def test_what_is_remembered_wrongly_is_rendered_plainly_and_counted(tokenizer, monkeypatch):
    right = TurnRenderer.render

    def wrong_at_the_end(self, messages, **more):
        text = right(self, messages, **more)
        return text if more["add_generation_prompt"] else text + " "

    monkeypatch.setattr(TurnRenderer, "render", wrong_at_the_end)
    reasons = []
    samples = render_samples(chat(1), tokenizer, on_plain=reasons.append)
    assert as_lists(samples) == as_lists(naive_samples(chat(1), tokenizer))
    assert reasons == ["the template writes other text than what was remembered of it"]


def test_an_error_that_no_template_raises_is_not_hidden(tokenizer, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr(TurnRenderer, "render", broken)
    with pytest.raises(AssertionError, match="a bug"):
        render_samples(chat(1), tokenizer)


def test_counts_name_the_first_and_are_the_same_in_every_run():
    counts = RenderedPlainly()
    counts.add("a:1", reason_of(TypeError("no\n  <Macro at 0x7f01>")))
    assert str(counts) == (
        "slow: 1 conversation was rendered plainly; the first, a:1: TypeError: no <Macro at 0x...>"
    )
    counts.plus(RenderedPlainly(2, "b:1: KeyError: 'x'"))
    assert str(counts).startswith("slow: 3 conversations were rendered plainly; the first, a:1: ")


@pytest.fixture
def files(tokenizer, tmp_path):
    """A folder with a model's config and tokenizer, and data: lines 2 and 4 call a tool."""
    chats = [chat(number, with_call=number % 2 == 0) for number in range(1, 5)]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in chats]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    tokenizer.save_pretrained(tmp_path / "model")
    tiny = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    tiny |= {"num_attention_heads": 2, "layer_types": ["full_attention"]}
    config = json.loads(CONFIG_PATH.read_text()) | tiny
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def test_prepare_and_train_say_how_many_and_why_the_first(files, capsys):
    data, model = files / "data.jsonl", files / "model"
    said = f"slow: 2 conversations were rendered plainly; the first, {data}:2: {TYPE_ERROR}"
    assert run("prepare", data, "--tokenizer", model, "--output", files / "prepared") == 0
    assert said in capsys.readouterr().err
    train = ("train", data, "--model", model, "--output", files / "run", "--max_steps")
    assert run(*train, 1, "--from_config", "--use_cpu", "--disable_tqdm", "true") == 0
    assert said in capsys.readouterr().err


def test_a_prepared_folder_counts_over_shards_and_processes(files, tokenizer):
    settings = {"shard_lines": 1, "num_proc": 2}
    manifest = prepare([files / "data.jsonl"], files / "out", tokenizer, **settings)
    first = f"{files / 'data.jsonl'}:2: {TYPE_ERROR}"
    assert manifest["rendered_plainly"] == {"conversations": 2, "first": first}


def test_nothing_is_said_where_nothing_was_rendered_plainly(files, tokenizer, capsys):
    data = files / "few.jsonl"
    data.write_text((files / "data.jsonl").read_text().splitlines(keepends=True)[0])
    assert run("prepare", data, "--tokenizer", files / "model", "--output", files / "out") == 0
    assert "plainly" not in capsys.readouterr().err
    collator = TreeCollator(tokenizer)
    collator([chat(1)])
    assert collator.rendered_plainly.conversations == 0
    collator([chat(1, with_call=True)])
    assert collator.rendered_plainly.conversations == 1
