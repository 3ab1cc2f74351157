"""Thinking of earlier turns by its name, empty thoughts, and templates that write the date."""

import json
from dataclasses import replace

import pytest
from chat_cases import TOOL, hand_rendered
from chat_tokenizer import chat_templates, chat_tokenizer
from template_table import outcome, settings_of

from flexmask import TreeCollator, build_tree, open_prepared, prepare
from flexmask.data.renderer import Renderer, render_samples
from flexmask.data.thinking import thinking_rule
from flexmask.data.trees import load_trees
from flexmask.errors import DataError, LeftOutError, TemplateError
from flexmask.training.data import settle_renderer
from flexmask.training.options import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:the chat template")  # announcements

FLAGS = {  # each template's default, and the setting that makes it the other
    "qwen3_6": ("interleaved", {"preserve_thinking": True}),
    "qwen3_8": ("preserved", {"preserve_thinking": False}),
    "lfm2_2_5": ("interleaved", {"preserve_thinking": True}),
    "nemotron_3_nano": ("interleaved", {"truncate_history_thinking": False}),
}
FOUND = FLAGS | {
    "glm_4_7": ("interleaved", {"clear_thinking": False}),
    "kimi_k2_6": ("interleaved", {"preserve_thinking": True}),
}
OTHER = {"interleaved": "preserved", "preserved": "interleaved"}


def conversation(num_users, num_tools):
    """Each user is answered after so many calls of a tool; every assistant message thinks."""
    messages = []
    for user in range(num_users):
        messages.append({"role": "user", "content": f"What is {user} plus 2?"})
        for call in range(num_tools):
            function = {"name": "add", "arguments": {"a": user, "b": call}}
            thought = f"Ask again, {user} and {call}."
            messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": thought,
                    "tool_calls": [{"type": "function", "function": function}],
                }
            )
            messages.append({"role": "tool", "name": "add", "content": f"{user + call}"})
        answer = {
            "role": "assistant",
            "reasoning_content": f"Sum {user}.",
            "content": f"It is {user}.",
        }
        messages.append(answer)
    return messages


CHATS = {"chat": (8, 0), "loop": (1, 4), "four users": (4, 3)}


@pytest.mark.parametrize(
    "name", ["qwen3", "glm4moe", "deepseek_r1_distill", "muse_glimmer", "qwen2_5"]
)
def test_templates_without_a_setting_are_named_by_what_they_do(name):
    found = {
        "qwen3": "interleaved, as the template does",
        "glm4moe": "interleaved, as the template does",
        "deepseek_r1_distill": "interleaved, as the template does",
        "muse_glimmer": "preserved, as the template does",
        "qwen2_5": "none, the chat template writes no thinking",
    }
    assert str(thinking_rule(chat_tokenizer(name))) == found[name]


@pytest.mark.parametrize("name", ["gptoss", "kimi_k2_thinking", "muse_glimmer"])
def test_the_rule_of_a_template_is_known_with_tools_too(name):
    rule = thinking_rule(chat_tokenizer(name), [TOOL])
    assert rule.history == thinking_rule(chat_tokenizer(name)).history
    assert rule.history == ("preserved" if name == "muse_glimmer" else "interleaved")


@pytest.mark.parametrize("name", FOUND)
def test_the_setting_is_found_in_the_source_of_the_template(name):
    default, flag = FOUND[name]
    other = OTHER[default]
    tokenizer = chat_tokenizer(name)
    assert thinking_rule(tokenizer).others == {json.dumps(flag): other}
    assert thinking_rule(tokenizer, asked=default).flag == {}
    rule = thinking_rule(tokenizer, asked=other)
    assert (rule.history, rule.flag) == (other, flag)
    assert (
        str(rule) == f"{other}, by the template's {json.dumps(flag)}; serve with the same setting"
    )


@pytest.mark.parametrize("asked", ["template", "interleaved", "preserved"])
@pytest.mark.parametrize("shape", CHATS)
@pytest.mark.parametrize("name", FLAGS)
def test_samples_equal_rendering_by_hand_with_the_setting(name, shape, asked):
    messages, tools = conversation(*CHATS[shape]), [TOOL] if CHATS[shape][1] else None
    tokenizer = chat_tokenizer(name)
    default, flag = FLAGS[name]
    settings = flag if asked == OTHER[default] else {}
    samples = render_samples(messages, tokenizer, tools=tools, thinking_history=asked)
    for sample in samples:
        prompt, full = hand_rendered(tokenizer, messages, sample.key, tools, **settings)
        context = sample.input_ids[sample.loss_weights == 0]
        assert tokenizer.decode(context) == prompt
        assert full.startswith(tokenizer.decode(sample.input_ids))
    segments = build_tree(samples).segments
    num_ends = len(segments) - len({s.parent for s in segments} - {None})
    assert num_ends == 1 or asked != "preserved"


@pytest.mark.parametrize(
    ("name", "asked"), [("qwen3", "preserved"), ("muse_glimmer", "interleaved")]
)
def test_a_template_that_cannot_do_it_is_refused_with_the_reason(name, asked):
    verb = {"preserved": "lacks", "interleaved": "holds"}[asked]
    reason = (
        f"message 3: its prompt {verb} the thinking of message 1, which thinking_history='{asked}'"
    )
    with pytest.raises(TemplateError, match=reason):
        render_samples(conversation(2, 0), chat_tokenizer(name), thinking_history=asked)
    render_samples(conversation(1, 0), chat_tokenizer(name), thinking_history=asked)


def test_a_template_that_drops_thinking_between_calls_is_not_interleaved():
    tokenizer = chat_tokenizer("qwen3_6")
    source = tokenizer.chat_template.replace("loop.index0 > ns.last_query_index", "loop.last")
    assert source != tokenizer.chat_template
    dropping = chat_tokenizer.__wrapped__("qwen3_6")
    dropping.chat_template = source
    assert thinking_rule(dropping).history == "dropped"
    with pytest.raises(
        TemplateError, match="message 3: its prompt lacks the thinking of message 1"
    ):
        render_samples(conversation(1, 2), dropping, tools=[TOOL], thinking_history="interleaved")


def test_what_the_caller_sets_is_left_as_it_is():
    settings = {"preserve_thinking": True}
    with pytest.raises(TemplateError, match="holds the thinking of message 1"):
        render_samples(
            conversation(2, 0),
            chat_tokenizer("qwen3_6"),
            chat_template_kwargs=settings,
            thinking_history="interleaved",
        )


def test_unknown_values_are_refused():
    for name, value in (
        ("thinking_history", "keep"),
        ("empty_thinking", "drop"),
        ("date", "today"),
    ):
        with pytest.raises(DataError, match=f"{name} must be .*, got '{value}'"):
            Renderer(None, **{name: value})


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_8", "glm4moe", "nemotron_3_nano", "deepseek_r1_distill"]
)
def test_empty_thoughts_are_counted_and_left_out_on_request(name):
    messages = conversation(3, 0)
    for index in (1, 5):
        del messages[index]["reasoning_content"]
    renderer = Renderer(chat_tokenizer(name))
    assert renderer.render(messages).num_empty_thoughts == 2
    assert renderer.render(conversation(3, 0)).num_empty_thoughts == 0
    strict = replace(renderer, empty_thinking="skip_conversation")
    with pytest.raises(
        LeftOutError, match="message 1 has no thinking, and the chat template writes"
    ):
        strict.render(messages)


@pytest.mark.parametrize("name", ["gptoss", "qwen2_5", "qwen3_5_nothink"])
def test_templates_that_write_no_empty_thought_have_none(name):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert Renderer(chat_tokenizer(name)).render(messages).num_empty_thoughts == 0


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_conversations_left_out_are_listed_and_do_not_stop_the_run(
    tmp_path, on_bad_line, tokenizer
):
    silent = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(m) + "\n" for m in (conversation(2, 0), silent)))
    tokenizer = chat_tokenizer("qwen3")
    renderer = Renderer(tokenizer)
    assert "; 1 sample without thinking, for which" in load_trees([data], renderer).summary()
    strict = replace(renderer, empty_thinking="skip_conversation")
    found = load_trees([data], strict, on_bad_line=on_bad_line)
    assert len(found) == 1
    assert [bad.line for bad in found.bad_lines] == [2]
    settings = {"empty_thinking": "skip_conversation", "on_bad_line": on_bad_line}
    manifest = prepare([data], tmp_path / "out", tokenizer, **settings)
    assert (manifest["conversations"], manifest["bad_lines"], manifest["empty_thoughts"]) == (
        1,
        1,
        0,
    )
    assert prepare([data], tmp_path / "all", tokenizer)["empty_thoughts"] == 1


DATED = [
    ("llama3_2", "Today Date: 31 Jan 2026"),
    ("gptoss", "Current date: 2026-01-31"),
]


@pytest.mark.parametrize(("name", "written"), DATED)
def test_the_date_of_a_template_can_be_set(name, written):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    tokenizer = chat_tokenizer(name)
    (sample,) = render_samples(messages, tokenizer, date="2026-01-31")
    assert written in tokenizer.decode(sample.input_ids)
    (today,) = render_samples(messages, tokenizer)
    assert written not in tokenizer.decode(today.input_ids)
    assert Renderer(tokenizer).dated("2026-01-31").date == "2026-01-31"
    assert Renderer(tokenizer, date="2025-05-05").dated("2026-01-31").date == "2025-05-05"
    assert TreeCollator(tokenizer).renderer.date is not None
    assert Renderer(chat_tokenizer("qwen3"), date="2026-01-31").dated().date is None


def test_a_folder_that_is_gone_on_with_keeps_its_date(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(conversation(2, 0)) + "\n")
    tokenizer = chat_tokenizer("gptoss")
    folder = tmp_path / "out"
    begun = prepare([data], folder, tokenizer, date="2026-01-31")
    (folder / "manifest.json").unlink()
    assert prepare([data], folder, tokenizer) == begun
    assert len(open_prepared(folder, tokenizer)) == 1
    with pytest.raises(DataError, match="was begun with date '2026-01-31', not '2026-02-01'"):
        prepare([data], folder, tokenizer, date="2026-02-01")
    with pytest.raises(DataError, match="was made with date '2026-01-31', not '2026-02-01'"):
        open_prepared(folder, tokenizer, date="2026-02-01")


def shown_by_samples(name, settings):
    """What the contexts of samples hold of earlier thinking; None where no thinking is written."""
    case = "thinking+tools" if outcome(name, "thinking+tools", settings).samples else "thinking"
    samples = outcome(name, case, settings).samples
    if not samples:
        return None
    decode = chat_tokenizer(name).decode
    *_, before, last = (decode(sample.input_ids[sample.loss_weights == 0]) for sample in samples)
    if "Two and two." in last:
        return {"preserved"}
    if "I should call it." in last:
        return {"partly preserved"}
    if case == "thinking":  # no loop of calls tells them apart
        return {"dropped", "interleaved"}
    return {"interleaved" if "I should call it." in before else "dropped"}


@pytest.mark.parametrize("name", chat_templates())
def test_the_probe_finds_what_samples_show(name):
    for settings in settings_of(name):
        tools = [TOOL] if outcome(name, "thinking+tools", settings).samples else None
        shown = shown_by_samples(name, settings) or {"none"}
        assert thinking_rule(chat_tokenizer(name), tools, settings).history in shown


def test_a_run_goes_on_with_the_date_and_settings_of_its_data_or_checkpoint(tmp_path):
    renderer = Renderer(chat_tokenizer("gptoss"))
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "flexmask.json").write_text(json.dumps({"date": "2026-01-31"}))
    config = TrainConfig(data=[str(tmp_path / "data.jsonl")], model="m", output="o")
    assert settle_renderer(renderer, config, str(checkpoint)).date == "2026-01-31"
    assert settle_renderer(renderer, config, None) == renderer.dated()
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(conversation(2, 0)) + "\n")
    settings = {"date": "2025-05-05", "chat_template_kwargs": {"reasoning_effort": "low"}}
    prepare([data], tmp_path / "out", renderer.tokenizer, **settings)
    settled = settle_renderer(renderer, replace(config, data=[str(tmp_path / "out")]), None)
    assert {name: settled.settings[name] for name in settings} == settings
