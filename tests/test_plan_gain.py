"""What `flexmask plan` says of the gain: chains, leaves, their causes, and the other ways."""

import copy
import json

import pytest
from chat_cases import TOOL
from chat_tokenizer import chat_tokenizer
from command_cases import write_conversations

from flexmask import build_tree, render_samples
from flexmask.data.files import read_conversations
from flexmask.data.renderer import Renderer
from flexmask.tools.plan.report import CHAIN, plan_text
from flexmask.tools.plan.survey import make_plan

CALL = {
    "type": "function",
    "id": "call00000",
    "function": {"name": "add", "arguments": {"a": 2, "b": 2}},
}


def conversation(*, users, calls=0, thinks=True):
    """So many questions, each answered after so many calls of a tool."""
    messages = []

    def say(content, **more):
        thought = {"reasoning_content": f"Thought {len(messages)}."} if thinks else {}
        messages.append({"role": "assistant", "content": content, **thought, **more})

    for number in range(users):
        messages.append({"role": "user", "content": f"Question {number}?"})
        for _ in range(calls):
            say("", tool_calls=[CALL])
            result = {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "four"}
            messages.append(result)
        say(f"Answer {number}.")
    return {"messages": messages, **({"tools": [TOOL]} if calls else {})}


CHAT = conversation(users=8)
LOOP = conversation(users=1, calls=6)
AGENT = conversation(users=4, calls=3)


@pytest.fixture
def plan_of(tmp_path):
    def make(chat, tokenizer, **settings):
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps(chat) + "\n")
        return make_plan([path], Renderer(tokenizer, **settings))

    return make


def with_template(template):
    tokenizer = copy.deepcopy(chat_tokenizer("qwen2_5"))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("chat", "leaves"), [(CHAT, 8), (LOOP, 1), (AGENT, 4)], ids=["chat", "loop", "agent"]
)
@pytest.mark.parametrize(
    ("name", "history", "preserves"),
    [
        ("qwen3", "template", False),
        ("qwen3_8", "template", True),
        ("qwen3_8", "interleaved", False),
        ("qwen3_6", "preserved", True),
    ],
)
def test_plan_counts_leaves_and_says_where_they_come_from(
    name, history, preserves, chat, leaves, plan_of
):
    leaves = 1 if preserves else leaves
    plan = plan_of(chat, chat_tokenizer(name), thinking_history=history)
    assert plan.leaves == leaves
    assert plan.branches == ({"dropped thinking": leaves - 1} if leaves > 1 else {})
    samples = render_samples(chat, chat_tokenizer(name), thinking_history=history)
    tokens = build_tree(samples).num_tokens
    text = plan_text(plan)
    first_screen = text[: text.index("visited")]
    for ratio in (sum(map(len, samples)) / tokens, len(samples[-1]) / tokens):
        assert f"  {ratio:.2f}  " in first_screen
    assert (f"{CHAIN}: 1 of 1 conversation" in first_screen) is (leaves == 1)
    assert (plan.mistrained.one_render == 0) is (leaves == 1)
    wrong = f"{plan.mistrained.one_render:,} (" if leaves > 1 else "nothing"
    assert f"  {wrong}" in next(line for line in text.splitlines() if "one render" in line)
    assert f"{leaves} lea" in first_screen


@pytest.mark.parametrize("in_record", [False, True], ids=["run", "record"])
def test_causes_are_found_with_the_settings_of_run_and_record(in_record, plan_of):
    settings = {"chat_template_kwargs": {"preserve_thinking": False}}
    chat, run = (AGENT | settings, {}) if in_record else (AGENT, settings)
    plan = plan_of(chat, chat_tokenizer("qwen3_8"), **run)
    assert (plan.leaves, plan.branches) == (4, {"dropped thinking": 3})


def test_calls_without_thinking_branch_a_tool_loop_of_qwen3(plan_of):
    """It writes an empty thought for the last message, and none once a result follows."""
    plan = plan_of(conversation(users=1, calls=6, thinks=False), chat_tokenizer("qwen3"))
    assert (plan.leaves, plan.branches) == (7, {"dropped empty thought": 6})


def template_with(changed="m.content", before=""):
    """A template that writes earlier answers as `changed`, and `before` before each message."""
    return (
        "{% set ask = messages | selectattr('role', 'eq', 'user') | list | last %}"
        "{% for m in messages %}"
        "{% set is_old = m.role == 'assistant' and not loop.last %}"
        f"{before}<|im_start|>{{{{ m.role }}}}\n"
        f"{{{{ {changed} if is_old else m.content }}}}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TOOLS_LAST = "{{ tools if tools and m == ask }}"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("gptoss", "rewritten stop token"),
        ("qwen3", "dropped empty thought"),
        ("qwen3_8", "other tokens"),
        (template_with("m.content | upper"), "rewritten history"),
        (template_with("m.content | trim('.')"), "rewritten history"),
        (template_with(before=TOOLS_LAST), "tools"),
        (template_with(), None),
    ],
)
def test_each_cause_has_its_rule(template, cause, plan_of):
    tokenizer = with_template(template) if "{" in template else chat_tokenizer(template)
    chat = conversation(users=4, thinks=False)
    if cause == "tools":
        chat["tools"] = [TOOL]
    assert plan_of(chat, tokenizer).branches == ({cause: 3} if cause else {})


def test_words_that_are_dropped_beside_a_call_are_rewritten_history(plan_of):
    chat = conversation(users=2, calls=1, thinks=False)
    for message in chat["messages"]:
        message["content"] = message["content"] or "I look it up."
    assert plan_of(chat, chat_tokenizer("gptoss")).branches == {"rewritten history": 1}


def test_leaves_equal_brute_force_and_each_branch_counts_once(tokenizer, tmp_path):
    path = write_conversations(tmp_path / "few.jsonl", 12)
    plan, leaves = make_plan([path], Renderer(tokenizer)), []
    for chat in read_conversations(path):
        ids = [tuple(sample.input_ids) for sample in render_samples(chat, tokenizer)]
        leaves.append(sum(all(b[: len(a)] != a or a == b for b in ids) for a in set(ids)))
    assert plan.leaves == sum(leaves)
    assert plan.chains == leaves.count(1)
    assert sum(plan.branches.values()) == plan.leaves - plan.conversations


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8"])
def test_one_render_is_what_the_template_writes_up_to_the_last_trained_token(name, plan_of):
    tokenizer = chat_tokenizer(name)
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    tokens = len(tokenizer.encode(whole.removesuffix("\n"), add_special_tokens=False))
    followed = CHAT | {"messages": [*CHAT["messages"], {"role": "user", "content": "Thanks."}]}
    for chat in (CHAT, followed):
        assert plan_of(chat, tokenizer).one_render.work.num_tokens == tokens
