"""Chat templates, TRL's and those of `templates`, rendered by flexmask and by hand."""

import copy
import re
from pathlib import Path

import pytest
from chat_cases import CASES, assert_equal_to_hand, chat_case, hand_rendered, until_stop
from chat_tokenizer import chat_templates, chat_tokenizer, marking_tokenizer
from template_table import PATH, TRL, outcome, settings_of, template_table
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from flexmask.data.files import read_conversations
from flexmask.data.messages import Conversation
from flexmask.data.renderer import render_samples
from flexmask.data.template import ChatTemplate, announce_once
from flexmask.errors import FlexmaskError, TemplateError
from flexmask.model.load import load_tokenizer
from flexmask.training.stops import trained_stops
from flexmask.tree.build import build_tree
from flexmask.tree.sample import Sample

pytestmark = pytest.mark.filterwarnings("ignore:the chat template")  # announcements

DATA = Path(__file__).parents[2] / "shared" / "data" / "reason_tool_use.jsonl"
RUNS = [
    pytest.param(name, case, settings, id="-".join([name, case, *map(str, settings.values())]))
    for name in chat_templates()
    for settings in settings_of(name)
    for case in CASES
]
REASONS = (
    r"drops or changes the message's (thinking|content|tool call \d+); (use|this message has)",
    r"leaves out (tool|message) \d+ \(.*\); remove",
    r"cannot write it: .+; change",
    r"does not continue its own prompt",
)


@pytest.mark.parametrize(("name", "case", "settings"), RUNS)
def test_samples_equal_hand_rendered_turns_or_are_refused_with_the_reason(name, case, settings):
    result = outcome(name, case, settings)
    if result.verdict == "refused":
        assert any(re.search(pattern, result.notes[0]) for pattern in REASONS), result.notes
        return
    tokenizer, composed = chat_tokenizer(name), result.verdict == "composed"
    assert_equal_to_hand(result.samples, tokenizer, name, case, settings, composed=composed)


@pytest.mark.parametrize("name", chat_templates())
def test_tokens_spell_the_template_where_a_tokenizer_marks_the_beginning_of_a_text(name):
    plain, tokenizer = chat_tokenizer(name), marking_tokenizer(name)
    cases = [case for case in ("thinking", "plain") if outcome(name, case, {}).samples]
    if not cases:  # both are refused, as another test shows
        return
    messages, _ = chat_case(cases[0])
    written = [plain.decode(sample.input_ids) for sample in render_samples(messages, plain)]
    for text, sample in zip(written, render_samples(messages, tokenizer), strict=True):
        assert tokenizer.decode(sample.input_ids) == tokenizer.decode(tokenizer.encode(text))


def rendered(name: str, case: str, number: int = 0, **settings) -> tuple[str, str]:
    """Context and completion of a case's sample, as text."""
    tokenizer = chat_tokenizer(name)
    messages, tools = chat_case(case)
    samples = render_samples(messages, tokenizer, tools=tools, chat_template_kwargs=settings)
    trained = samples[number].loss_weights > 0
    ids = samples[number].input_ids
    return tokenizer.decode(ids[~trained]), tokenizer.decode(ids[trained])


def test_deepseek_r1_writes_thinking_then_tag_then_answer():
    context, completion = rendered("deepseek_r1_distill", "thinking", 1)
    assert context.endswith("<\uff5cAssistant\uff5c><think>\n")
    assert "Two and two." not in context
    assert completion == (
        "One more\nthan four.\n</think>\n\nThat makes 5.<\uff5cend\u2581of\u2581sentence\uff5c>"
    )


def test_nemotron_completes_an_opened_thought_with_an_empty_one():
    context, completion = rendered("nemotron_3_nano", "plain")
    assert context.endswith("<think>\n")
    assert completion == "\n</think>\nIt is 4.<|im_end|>"


def test_gptoss_keeps_the_thinking_of_the_tool_call_in_the_context_of_the_answer():
    context, completion = rendered("gptoss", "thinking+tools", 1)
    assert "<|channel|>analysis<|message|>I should call it.<|end|>" in context
    assert completion == (
        "<|channel|>analysis<|message|>Two and two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    )
    later, _ = rendered("gptoss", "thinking+tools", 2)
    assert "I should call it." not in later
    assert "It is 4.<|end|>" in later


def test_phi3_ends_a_turn_at_its_own_token_and_not_at_the_end_of_text():
    assert rendered("phi3", "plain")[1] == "It is 4.<|end|>"


def test_cohere2_ends_a_turn_after_both_of_its_tokens():
    assert rendered("cohere2", "plain")[1] == "It is 4.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


def test_glm_ends_a_turn_with_the_role_of_the_next_one():
    assert rendered("glm4moe", "plain")[1] == "\n<think></think>\nIt is 4.<|user|>"
    assert rendered("glm4moe", "plain", 1)[1] == "\n<think></think>\nThat makes 5.<|user|>"
    assert rendered("glm4moe", "tools")[1].endswith("</tool_call><|observation|>")


def test_kimi_k2_answers_get_their_thinking_into_the_thought_that_the_template_empties():
    context, completion = rendered("kimi_k2_thinking", "thinking+tools", 1)
    assert "<think>I should call it.</think>" in context
    assert completion == "<think>Two and two.</think>It is 4.<|im_end|>"
    context, completion = rendered("kimi_k2_6", "thinking+tools", 1)
    assert context.endswith("<|im_middle|><think>")
    assert completion == "Two and two.</think>It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "settings"), [("kimi_k2_thinking", {}), ("deepseek_v3_1", {"thinking": True})]
)
def test_white_space_of_composed_thinking_stays_as_it_is(name, settings):
    messages, _ = chat_case("thinking")
    messages[1]["reasoning_content"] = "\n Two.\n"
    tokenizer = chat_tokenizer(name)
    sample = render_samples(messages[:2], tokenizer, chat_template_kwargs=settings)[0]
    assert "<think>\n Two.\n</think>It is 4." in tokenizer.decode(sample.input_ids)


def test_deepseek_v3_1_thinks_up_to_its_own_tag_and_answers_behind_it():
    context, completion = rendered("deepseek_v3_1", "thinking", 1, thinking=True)
    assert context.endswith("<\uff5cAssistant\uff5c><think>")
    assert completion == (
        "One more\nthan four.</think>That makes 5.<\uff5cend\u2581of\u2581sentence\uff5c>"
    )


def test_stops_of_glm_are_the_roles_of_the_next_turns():
    tokenizer = chat_tokenizer("glm4moe")
    trees = [build_tree(render_samples(chat_case("tools")[0], tokenizer))]
    names = tokenizer.convert_ids_to_tokens(trained_stops(trees, tokenizer))
    assert sorted(names) == ["<|observation|>", "<|user|>"]


def test_the_role_of_the_next_turn_inside_the_text_is_refused():
    messages, _ = chat_case("plain")
    messages[1]["content"] += "<|user|>"
    with pytest.raises(
        TemplateError, match=r"message 1: the text holds the stop token '<\|user\|>"
    ):
        render_samples(messages, chat_tokenizer("glm4moe"))


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.role + ': ' + m.content }}",  # no special token
        "{% if m.role == 'user' and not loop.first %}{{ raise_exception('one') }}{% endif %}"
        "{{ m.content }}",
        "{{ bos_token + m.content if m.role == 'user' else m.content }}",
        "{{ m.content if loop.last or m.role == 'user' else '.' }}",  # not once a turn follows
    ],
)
def test_a_turn_without_an_end_is_trained_without_one_and_with_a_warning(written):
    tokenizer = copy.deepcopy(chat_tokenizer("llama3"))
    tokenizer.chat_template = "{% for m in messages %}" + written + "{% endfor %}"
    announce_once.cache_clear()
    with pytest.warns(UserWarning, match="without a special token: the end of a turn is not"):
        samples = render_samples(chat_case("plain")[0][:2], tokenizer)
    assert tokenizer.decode(samples[0].input_ids).endswith("It is 4.")


def test_prompt_that_closes_the_thinking_is_refused_with_both_texts_and_the_remedy():
    messages, _ = chat_case("thinking")
    settings = {"enable_thinking": False}
    with pytest.raises(TemplateError) as error:
        render_samples(messages, chat_tokenizer("qwen3"), chat_template_kwargs=settings)
    text = str(error.value)
    assert text.startswith("message 1: the chat template does not continue its own prompt")
    assert r"</think>\n\n'" in text
    assert r"<think>\nTwo and two." in text
    assert "set chat_template_kwargs={'enable_thinking': True}" in text


def test_thinking_that_is_dropped_names_the_setting_with_which_it_is_written():
    messages, _ = chat_case("thinking")
    with pytest.raises(
        TemplateError, match=r"thinking; this message .* set .*\{'thinking': True\}"
    ):
        render_samples(messages, chat_tokenizer("deepseek_v3_1"))
    with pytest.raises(TemplateError, match="thinking; use a template"):  # it writes none with it
        render_samples(messages, chat_tokenizer("gemma4"))


def test_error_of_the_template_itself_is_named_with_its_message():
    messages, _ = chat_case("system")
    with pytest.raises(TemplateError, match=r"message 2: .* System role not supported; change"):
        render_samples(messages, chat_tokenizer("gemma"))


def test_tool_result_that_the_template_leaves_out_is_refused():
    messages, _ = chat_case("tools")
    messages[1] = {"role": "assistant", "content": "I ask.", "train": False}
    with pytest.raises(TemplateError, match=r"leaves out message 2 \(role tool\)"):
        render_samples(messages, chat_tokenizer("phi3"))


def test_tools_that_the_template_leaves_out_are_refused():
    messages, _ = chat_case("plain")
    _, tools = chat_case("tools")
    with pytest.raises(TemplateError, match=r"leaves out tool 0 \(add\); remove it"):
        render_samples(messages, chat_tokenizer("llama3"), tools=tools)


def test_content_lost_beside_a_tool_call_is_found_though_its_words_are_elsewhere():
    messages, tools = chat_case("thinking+tools")
    messages[1] = {**messages[1], "content": "call"}  # a word of the thinking
    with pytest.raises(TemplateError, match=r"message 1: .* the message's content"):
        render_samples(messages, chat_tokenizer("muse_glimmer"), tools=tools)


def test_second_tool_call_that_the_template_leaves_out_is_refused():
    messages, tools = chat_case("tools")
    messages[1]["tool_calls"] *= 2
    with pytest.raises(TemplateError, match=r"message 1: .* the message's tool call 1"):
        render_samples(messages, chat_tokenizer("gptoss"), tools=tools)


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
def test_stop_token_inside_the_text_is_refused(key):
    messages, _ = chat_case("thinking")
    messages[1][key] += " The token <|im_end|> ends it."
    with pytest.raises(TemplateError, match=r"message 1: the text holds the stop token '<\|im_end"):
        render_samples(messages, chat_tokenizer("qwen3"))


SPECIAL = [
    ("qwen3", "content", "<|im_start|>"),
    ("qwen3", "reasoning_content", "<|endoftext|>"),
    ("gptoss", "content", "<|call|>"),
    ("llama3", "content", "<|eom_id|>"),
    ("lfm2", "content", "<|tool_call_start|>"),
    ("qwen3", "tool_calls", "<|im_end|>"),
]


@pytest.mark.parametrize(("name", "key", "token"), SPECIAL)
def test_special_token_inside_the_text_is_refused(name, key, token):
    messages, _ = chat_case("tools" if key == "tool_calls" else "plain")
    if key == "tool_calls":
        messages[1][key][0]["function"]["arguments"] = {"a": [{"b": token}]}
    else:
        messages[1][key] = f"It is {token} here."
    with pytest.raises(TemplateError, match=r"message 1: the text holds the s\w+ token") as error:
        render_samples(messages, chat_tokenizer(name))
    assert repr(token) in str(error.value)
    messages[1]["train"] = False  # a context is what inference sees, whatever it holds
    assert render_samples(messages, chat_tokenizer(name))


def test_added_token_that_is_not_special_is_text():
    tokenizer = copy.deepcopy(chat_tokenizer("lfm2"))
    tokens = ["<|tool_call_start|>", "<|tool_call_end|>"]
    tokenizer.add_tokens([AddedToken(token, special=False) for token in tokens])
    messages, _ = chat_case("plain")
    messages[1]["content"] = "[add(a=2, b=2)]".join(tokens)
    samples = render_samples(messages, tokenizer)
    written = tokenizer.decode(samples[0].input_ids[samples[0].loss_weights > 0])
    assert written == messages[1]["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "tag", "argument"),
    [
        ("qwen3", "</tool_call>", "a"),
        ("glm4moe", "</arg_value>", "b"),
        ("qwen3", "<tool_call>", ""),
    ],
)
def test_tag_at_which_a_part_would_end_is_refused_inside_it(name, tag, argument):
    messages, tools = chat_case("tools")
    messages[1]["content"] = "It is in </think>, and here: "
    messages[1]["reasoning_content"] = ""
    if argument:
        messages[1]["tool_calls"][0]["function"]["arguments"][argument] = f"[{tag}]"
    else:
        messages[1]["content"] += tag
    part = f"argument '{argument}' of tool call 0" if argument else "content"
    with pytest.raises(TemplateError, match=f"message 1: the {part} holds '{tag}', the tag at"):
        render_samples(messages, chat_tokenizer(name), tools=tools)


def test_closing_tag_of_thinking_inside_an_answer_is_text():
    messages, _ = chat_case("plain")
    messages[-1] |= {"content": "Write </think> and <tool_call>.", "reasoning_content": ""}
    sample = render_samples(messages, chat_tokenizer("qwen3"))[-1]
    written = chat_tokenizer("qwen3").decode(sample.input_ids[sample.loss_weights > 0])
    assert written == "<think>\n\n</think>\n\nWrite </think> and <tool_call>.<|im_end|>"


def test_arguments_are_given_as_json_text_to_a_template_that_joins_strings():
    messages, _ = chat_case("tools")
    template = ChatTemplate(chat_tokenizer("deepseekv3"))
    completion = template.completion(template.prompt(messages[:1]), messages[:1], messages[1])
    assert '```json\n{"a": 2, "b": 2}\n```' in completion


def test_tokenizer_without_a_template_is_refused():
    class Bare:
        chat_template = None

    with pytest.raises(TemplateError, match=r"no chat template; set tokenizer\.chat_template"):
        render_samples(chat_case("plain")[0], Bare())


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "tools"])
def test_settings_that_are_flexmasks_own_are_refused(name):
    with pytest.raises(TemplateError, match=f"must not set '{name}'"):
        ChatTemplate(chat_tokenizer("qwen3"), settings={name: True})


def test_docs_table_is_the_one_that_the_templates_give():
    text = PATH.read_text(encoding="utf-8")
    if f"that {TRL} ships" not in text:
        pytest.skip(f"docs/templates.md was written with another version than {TRL}")
    assert text == template_table(), "run: python tests/template_table.py"


def render_or_error(conversation: Conversation, tokenizer) -> tuple[list[Sample], str]:
    try:
        return render_samples(conversation, tokenizer), ""
    except FlexmaskError as error:
        return [], str(error)


@pytest.mark.skipif(not DATA.exists(), reason="the shared conversations are not here")
@pytest.mark.parametrize(
    ("name", "num_samples"),
    [
        ("deepseek_r1_distill", 2),
        ("gemma4_v5", 112),
        ("glm4moe", 112),
        ("gptoss", 95),
        ("llama3_1", 0),
        ("qwen3", 112),
    ],
)
def test_real_conversations_are_exact_or_refused(name, num_samples):
    tokenizer = chat_tokenizer(name)
    num_found = 0
    for conversation in read_conversations(DATA):
        samples, error = render_or_error(conversation, tokenizer)
        if error:
            assert error.startswith(f"{conversation.where}: ")
            assert any(re.search(reason, error) for reason in REASONS)
        num_found += len(samples)
        for sample in samples:
            message = conversation.messages[sample.key]
            prompt, full = hand_rendered(
                tokenizer, conversation.messages, sample.key, conversation.tools
            )
            context = tokenizer.encode(prompt, add_special_tokens=False)
            trained = sample.loss_weights > 0
            assert sample.input_ids[~trained].tolist() == context
            written = tokenizer.decode(sample.input_ids[trained])
            assert message["reasoning_content"].strip() in written
            if full.startswith(prompt):
                assert written == until_stop(name, full[len(prompt) :], message)
            else:
                assert name in ("gptoss", "deepseek_r1_distill")
                assert full.rstrip().endswith(written.split("</think>\n\n")[-1])
    assert num_found == num_samples


def test_a_model_without_a_template_can_have_the_one_that_ships(tmp_path, tokenizer):
    own = copy.copy(tokenizer)
    own.chat_template = None
    own.save_pretrained(tmp_path / "base")
    given = load_tokenizer(str(tmp_path / "base"), "chatml")
    assert given.chat_template == tokenizer.chat_template
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    with pytest.raises(
        FlexmaskError, match=r"words: --chat_template chatml ends turns with '<\|im"
    ):
        load_tokenizer(str(tmp_path / "words"), "chatml")
