"""The accepted chat formats, and what is refused."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_cases import ANSWER, ANSWER_PARTS, BAD, CALL, RESULT, USE, USER

from flexmask.data.messages import Conversation, parse_conversation
from flexmask.errors import DataError, announce_once


def answer(message, **record):
    """The normal form of an assistant message that follows a question."""
    return parse_conversation({"messages": [USER, {"role": "assistant", **message}], **record})


def test_list_of_messages_is_a_conversation():
    assert parse_conversation([USER, ANSWER]).messages == [USER, ANSWER]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_field_has_three_names(key):
    assert answer({"content": "4", key: "Two and two."}).messages[1] == ANSWER


@pytest.mark.parametrize(
    "content",
    [
        "<think>Two and two.</think>4",
        "<think>\nTwo and two.\n</think>\n\n4",
        "Two and two.\n</think>\n\n4",
        [{"type": "reasoning", "content": "Two and two."}, {"type": "text", "value": "4"}],
        [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two and two."}]},
            {"type": "output_text", "content": "4"},
        ],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "Two and two."}]}, "4"],
        [{"type": "thinking", "thinking": None, "text": "Two and two.", "signature": "s"}, "4"],
        [{"type": "reasoning", "text": "Two and two."}, {"type": "text", "text": "4"}],
        [{"type": "reasoning", "reasoning": "Two and two."}, "4"],
        [{"type": "thinking", "thinking": "Two and two."}, {"type": "text", "text": "4"}],
        [{"type": "text", "text": "<think>Two and two.</think>4"}],
    ],
)
def test_thinking_in_content_becomes_its_own_field(content):
    assert answer({"content": content}).messages[1] == ANSWER


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_details": [{"type": "reasoning.text", "text": "Two and two.", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "Two and two."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Two and two.", "signature": "s"}]},
        {
            "reasoning": "Two and two.",
            "reasoning_details": [
                {"type": "reasoning.text", "text": part} for part in ANSWER_PARTS
            ],
        },
    ],
)
def test_blocks_beside_the_content_are_its_thinking(fields):
    assert answer({"content": "4", **fields}).messages[1] == ANSWER


def test_a_closing_tag_in_an_answer_is_answer_where_thinking_is_given_or_empty():
    content = "Write </think> behind the thought."
    for thinking in ("", "Two and two."):
        message = {"role": "assistant", "content": content, "reasoning_content": thinking}
        found = parse_conversation([USER, message]).messages
        assert found[1] == message
        assert parse_conversation(found).messages == found


@pytest.mark.parametrize(
    "message",
    [
        {"content": "4"},
        {"content": "<think>\n\n</think>\n\n4"},
        {"content": "4", "reasoning_content": " "},
        {"content": "4", "reasoning_content": None, "tool_calls": None, "train": None},
    ],
)
def test_thinking_without_words_is_no_thinking(message):
    assert answer(message).messages[1] == {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"function_call": {"name": "add", "arguments": '{"a": 2}'}},
        {"tool_calls": [{"name": "add", "parameters": {"a": 2}}]},
        {"tool_calls": [{"name": "add", "args": {"a": 2}, "type": "tool_call"}]},
    ],
)
def test_tool_calls_are_nested_with_arguments_as_objects(message):
    assert answer(message).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_tools_are_schemas_or_their_json_text(as_text, nested):
    function = {"name": "add", "parameters": {}}
    tools = [{"type": "function", "function": function} if nested else function]
    found = answer({"content": "4"}, tools=json.dumps(tools) if as_text else tools).tools
    assert found == [{"type": "function", "function": function}]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools):
    assert answer({"content": "4"}, tools=tools).tools is None


def test_parts_of_tools_are_calls_and_tool_messages():
    thought = {"type": "thinking", "thinking": "I add.", "signature": "s"}
    call = {"role": "assistant", "content": [thought, {"type": "text", "text": "So:"}, USE, USE]}
    failed = {**RESULT, "content": None, "is_error": True}
    results = {"role": "user", "content": [RESULT, failed, {"type": "text", "text": "Go on."}]}
    only = {"role": "user", "content": [{**RESULT, "cache_control": {"type": "ephemeral"}}]}
    found = parse_conversation([USER, call, results, call, only, ANSWER])
    turn = {
        "role": "assistant",
        "content": "So:",
        "reasoning_content": "I add.",
        "tool_calls": [{**CALL, "id": "c1"}] * 2,
    }
    result = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}
    assert found.messages == [
        *(USER, turn, result, {**result, "content": "", "is_error": True}),
        *({"role": "user", "content": "Go on."}, turn, result, ANSWER),
    ]


def test_sharegpt_with_tool_calls():
    found = parse_conversation(
        {
            "id": 7,
            "system": "You add.",
            "tools": '[{"name": "add", "parameters": {}}]',
            "conversations": [
                {"from": "human", "value": "What is 2 plus 2?"},
                {
                    "from": "function_call",
                    "value": '<think>I call.</think>{"name": "add", "arguments": {"a": 2}}',
                },
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "<think>Done.</think>It is 4."},
            ],
        }
    )
    assert found.id == "7"
    assert found.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert found.messages == [
        {"role": "system", "content": "You add."},
        USER,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I call.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4.", "reasoning_content": "Done."},
    ]


def test_conversations_may_also_hold_role_and_content():
    assert parse_conversation({"conversations": [USER, ANSWER]}).messages == [USER, ANSWER]


def test_developer_is_a_system_role():
    record = [{"role": "developer", "content": "Add."}, USER, ANSWER]
    assert parse_conversation(record).messages[0]["role"] == "system"


def test_other_keys_reach_the_template():
    result = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1", "x": None}
    call = {"role": "assistant", "tool_calls": [{**CALL, "id": "c1"}]}
    found = parse_conversation([USER, call, result, ANSWER]).messages
    assert found[1]["tool_calls"][0]["id"] == "c1"
    assert found[2] == {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}


MARKS = "train training trainable weight loss loss_weight loss_scale loss_mask step_loss_mask"


@pytest.mark.parametrize("key", MARKS.split())
def test_untrained_messages_are_marked(key):
    for no, yes in ((False, True), (0, 1), (0.0, 1.0)):
        found = parse_conversation(
            [{**USER, key: no}, {**ANSWER, key: no}, USER, {**ANSWER, key: yes}]
        )
        assert found.trained == [3]
        assert found.messages[1] == {**ANSWER, "train": False}
        assert found.messages[3] == ANSWER


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale"])
def test_a_message_may_have_a_weight(key):
    for marks in ({key: 0.5}, {key: 0.5, "train": True}):
        assert answer({**ANSWER, **marks}).messages[1] == {**ANSWER, "weight": 0.5}
    assert answer({**ANSWER, key: 2}).trained == [1]


def test_a_greeting_is_context_and_said_to_be():
    announce_once.cache_clear()
    greeting = {"role": "assistant", "content": "Hello!"}
    with pytest.warns(UserWarning, match="begin with a message of the assistant: .* not trained"):
        found = parse_conversation([greeting, USER, ANSWER])
    assert found.messages == [{**greeting, "train": False}, USER, ANSWER]
    assert found.trained == [2]
    assert found.has_greeting
    assert not parse_conversation([USER, {**ANSWER, "train": False}, USER, ANSWER]).has_greeting


def test_a_cut_message_is_context_alone():
    cut = {**ANSWER, "finish_reason": "length", "train": False}
    found = parse_conversation([USER, cut, USER, {**ANSWER, "finish_reason": "stop"}])
    assert found.messages == [USER, {**ANSWER, "train": False}, USER, ANSWER]


def test_messages_of_one_turn_are_joined():
    thought = {"role": "assistant", "content": "", "reasoning_content": "Two and two."}
    words = {"role": "assistant", "content": "I add.", "name": "a"}
    calls = [{"role": "assistant", "content": "\n", "tool_calls": [CALL], "id": 1} for _ in "12"]
    result = {"role": "tool", "content": "4"}
    found = parse_conversation([USER, thought, words, *calls, result, ANSWER]).messages
    turn = {**thought, **words, "tool_calls": [CALL, CALL], "id": 1}
    assert found == [USER, turn, result, ANSWER]


def test_settings_of_a_record_come_before_those_of_the_run():
    settings = {"enable_thinking": False}
    for own in (settings, json.dumps(settings)):
        found = answer({"content": "4"}, chat_template_kwargs=own)
        assert found.settings({"enable_thinking": True, "x": 1}) == {
            "enable_thinking": False,
            "x": 1,
        }
    assert answer({"content": "4"}).settings(None) == {}


def test_functions_are_the_old_name_of_tools():
    functions = [{"name": "add", "parameters": {}}]
    call = {"role": "assistant", "function_call": {"name": "add"}}
    result = {"role": "function", "name": "add", "content": "4"}
    found = parse_conversation({"messages": [USER, call, result, ANSWER], "functions": functions})
    assert found.tools == [{"type": "function", "function": functions[0]}]
    assert found.messages[2] == {**result, "role": "tool"}


def test_a_schema_of_the_input_is_that_of_the_parameters():
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    function = {"name": "add", "parameters": {"type": "object"}}
    assert answer({"content": "4"}, tools=tools).tools[0]["function"] == function
    assert "input_schema" in tools[0]


COLUMNS = {"messages": "chat", "role": "speaker", "content": "words", "tools": "functions_json"}


def test_keys_may_have_other_names():
    chat = [{"speaker": m["role"], "words": m["content"], "n": 1} for m in (USER, ANSWER)]
    found = parse_conversation({"chat": chat, "source": "x"}, columns=COLUMNS)
    assert [message["content"] for message in found.messages] == [USER["content"], "4"]
    assert found.unused_keys == ("source",)
    swapped = {"prompt": "4", "completion": USER["content"]}
    columns = {"prompt": "completion", "completion": "prompt"}
    assert parse_conversation(swapped, columns=columns).messages == [USER, PLAIN]
    for record, reason in (
        ({"chat": [USER]}, "has no 'speaker', which --data_columns takes for 'role'; the record"),
        ({"messages": []}, r"has no 'chat', .* and its messages have \['messages'\]"),
        (
            {"messages": [], "chat": chat},
            "has 'chat', which --data_columns takes for 'messages', a",
        ),
    ):
        with pytest.raises(DataError, match=reason):
            parse_conversation(record, columns=COLUMNS)


PLAIN = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("prompt", [USER["content"], [USER]])
@pytest.mark.parametrize("completion", ["4", [PLAIN]])
def test_prompt_and_completion_are_messages(prompt, completion):
    found = parse_conversation({"prompt": prompt, "completion": completion, "source": "x"})
    assert found.messages == [USER, PLAIN]
    assert found.unused_keys == ("source",)


def test_of_prompt_and_completion_only_the_completion_is_trained():
    call, result = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}
    record = {"prompt": [USER, ANSWER, USER], "completion": [call, result, ANSWER]}
    assert parse_conversation(record).trained == [3, 5]


def test_a_query_and_its_response_with_their_history():
    record = {"system": "Add.", "query": "2 + 2?", "response": "4", "history": [["1 + 1?", "2"]]}
    found = parse_conversation(record)
    assert [message["content"] for message in found.messages] == [
        "Add.",
        "1 + 1?",
        "2",
        "2 + 2?",
        "4",
    ]
    assert (found.trained, found.unused_keys) == ([2, 4], ())


def test_calls_and_results_in_messages_of_their_own_roles():
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'}
    result = {"role": "tool_response", "content": "4"}
    found = parse_conversation([USER, call, {**call, "loss": True}, result, result, ANSWER])
    assert found.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        *[{"role": "tool", "content": "4"}] * 2,
        ANSWER,
    ]
    assert parse_conversation([USER, {**call, "loss": False}, result, ANSWER]).trained == [3]


def test_an_instruction_is_a_user_message():
    record = {"instruction": "Add.", "input": "2 + 2", "output": "<think>Two.</think>4"}
    history, system = [["Hi", "Hello"]], {"role": "system", "content": "You add."}
    found = parse_conversation({**record, "history": history, "system": "You add."})
    assert [message["content"] for message in found.messages] == [
        *("You add.", "Hi", "Hello", "Add.\n2 + 2", "4")
    ]
    assert found.messages[0] == system
    assert found.messages[4]["reasoning_content"] == "Two."
    assert (found.trained, found.unused_keys) == ([2, 4], ())
    plain = parse_conversation({**record, "input": "", "history": []})
    assert plain.messages[0] == {"role": "user", "content": "Add."}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_messages_is_message_0(key):
    system = {"role": "system", "content": "Add."}
    for messages in ([USER, ANSWER], [system, USER, ANSWER]):
        found = parse_conversation({"messages": messages, key: "Add."}).messages
        assert found == [system, USER, ANSWER]


def test_keys_that_nothing_is_made_of_are_noted():
    record = {"source": "x", "images": [], "label": True, "weight": 1, "chosen": None, "y": None}
    assert answer({"content": "4"}, **record).unused_keys == ("source",)


def test_record_is_not_changed():
    record = {"messages": [USER, {"role": "assistant", "content": "<think>a</think>b"}]}
    before = json.dumps(record)
    parse_conversation(record)
    assert json.dumps(record) == before


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD)
def test_rejects_bad_record_in_one_line_with_its_place(record, reason):
    with pytest.raises(DataError, match=f"^data.jsonl:3: .*{reason}") as error:
        parse_conversation(record, "data.jsonl:3")
    assert "\n" not in str(error.value)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1)
words = texts.filter(lambda text: bool(text.strip()))
arguments = st.dictionaries(st.text("abc", min_size=1), st.none() | st.integers() | texts)
calls = st.builds(
    lambda name, values: {"name": name, "arguments": values}, st.text("xyz", min_size=1), arguments
)
turns = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words},
    optional={
        "reasoning": texts,
        "tool_calls": st.lists(calls, max_size=3),
        "train": st.just(True),
        "weight": st.sampled_from([0.5, 1, 2]),
        "name": texts,
    },
)


@given(st.lists(turns, min_size=1, max_size=4), st.booleans())
def test_normal_form_is_its_own_normal_form(answers, with_system):
    system = [{"role": "system", "content": "s"}] if with_system else []
    record = [*system, *(message for turn in answers for message in (USER, turn))]
    once = parse_conversation(record)
    assert parse_conversation({"messages": once.messages, "tools": once.tools}) == once
    assert parse_conversation(once) is once
    assert len(once.trained) == len(answers)


@given(words, words)
def test_think_block_and_field_say_the_same(thinking, content):
    thinking, content = thinking.strip("\n"), content.lstrip("\n")
    fielded = answer({"content": content, "reasoning_content": thinking})
    tagged = answer({"content": f"<think>\n{thinking}\n</think>\n\n{content}"})
    assert tagged == fielded


keys = (
    "role content messages conversations from value tool_calls type text function name arguments "
    "tools train reasoning system summary thinking_blocks loss images functions finish_reason"
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(keys.split()) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_a_conversation_or_a_data_error(record):
    with suppress(DataError):
        assert isinstance(parse_conversation(record), Conversation)


def some(base, *more, value):
    """Objects with the keys of `base`, and perhaps one of `more`, which holds a `value`."""
    extra = st.dictionaries(st.sampled_from(more), value, max_size=1)
    return st.builds(lambda own: {**base, **own}, extra)


word = st.just("W")
words_or_parts = word | st.lists(word | some({"type": "text"}, "text", "more", value=word))
part = some({"type": "text", "text": "W"}, "value", "summary", "more", value=words_or_parts)
thought = some({"type": "thinking"}, "text", "summary", "reasoning", value=words_or_parts)
function = some({"name": "W"}, "arguments", "kwargs", "input", value=st.just({"W": "W"}))
call = function | some({"function": {"name": "W", "args": {"W": "W"}}}, "input", value=function)
content = word | st.lists(part, max_size=2) | st.tuples(thought, part).map(list)
calls_made = st.lists(call, max_size=2)
fields = {
    "thinking_blocks": st.lists(thought, max_size=1),
    **dict.fromkeys(("reasoning", "value", "mood"), word),
}
others = dict.fromkeys(("system", "id", "source", "label", "y"), word)


def numbered(value, words):
    """`value` with each word replaced by one of its own, which is added to `words`."""
    if isinstance(value, dict):
        return {key: numbered(item, words) for key, item in value.items()}
    if isinstance(value, list):
        return [numbered(item, words) for item in value]
    if value == "W":
        words.append(f"word{len(words)}.")
        return words[-1]
    return value


@given(
    st.fixed_dictionaries({"content": content, "tool_calls": calls_made}, optional=fields),
    st.fixed_dictionaries({}, optional={**others, "tools": st.lists(function, max_size=1)}),
)
def test_no_word_becomes_nothing(message, record):
    words = []
    record = numbered({**record, "messages": [USER, {"role": "assistant", **message}]}, words)
    with suppress(DataError):
        found = parse_conversation(record)
        kept = [found.messages, found.tools, found.id, [record[key] for key in found.unused_keys]]
        text = json.dumps(kept)
        assert [word for word in words if word not in text] == []


def test_messages_and_calls_may_be_the_json_text_of_a_list():
    call = {"id": "1", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    text = [messages[0], {**messages[1], "tool_calls": json.dumps([call])}, *messages[2:]]
    expected = parse_conversation(messages).messages
    assert parse_conversation({"messages": json.dumps(text)}).messages == expected
    columns = {"messages": "chat", "role": "who"}
    renamed = [{("who" if k == "role" else k): v for k, v in m.items()} for m in messages]
    found = parse_conversation({"chat": json.dumps(renamed)}, columns=columns)
    assert found.messages == expected
