"""Rendering a conversation turn by turn without doing anything twice: equal to doing it naively."""

import random

import pytest
from chat_cases import TOOL
from chat_tokenizer import chat_tokenizer, template_files
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.naive_rendering import naive_samples
from flexmask import render_samples
from flexmask.data.loops import rewrite_loops
from flexmask.data.memo import TurnRenderer, _compiled
from flexmask.data.template import ChatTemplate
from flexmask.data.tokenize import encode_texts, why_whole
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import FlexmaskError

pytestmark = pytest.mark.filterwarnings("ignore:the chat template")

WORDS = [
    "two",
    " and",
    "\n\n",
    "  ",
    "é",
    "👍🏽",
    "<think>",
    "</think>",
    "<|im",
    "_end|>",
    "<",
    "[x]",
]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)


def conversation(seed, num_turns=6):
    """Turns with and without thinking, tool calls, untrained messages and awkward texts."""
    rng = random.Random(seed)
    with_thinking, with_tools = rng.random() < 0.6, rng.random() < 0.5

    def text():
        return "".join(rng.choice(WORDS[:6]) for _ in range(rng.randint(1, 5))) + rng.choice("xyz")

    def assistant(**more):
        message = {"role": "assistant", "content": text(), **more}
        if with_thinking and rng.random() < 0.8:
            message["reasoning_content"] = text()
        if rng.random() < 0.15:
            message["train"] = False
        return message

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
    for _ in range(num_turns):
        messages.append({"role": "user", "content": text()})
        for _ in range(rng.randint(0, 2) if with_tools else 0):
            arguments = {"a": rng.randint(0, 9), "b": text()}
            call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
            messages.append(assistant(tool_calls=[call]))
            messages.append({"role": "tool", "name": "add", "content": text()})
        messages.append(assistant())
    messages[-1].pop("train", None)
    return messages, [TOOL] if with_tools else None


def outcome_of(render, messages, tokenizer, **options):
    """The samples as plain lists, or the error."""
    try:
        samples = render(messages, tokenizer, **options)
        return [(s.key, s.input_ids.tolist(), s.loss_weights.tolist()) for s in samples]
    except FlexmaskError as error:
        return str(error)


@pytest.mark.parametrize("name", template_files())
def test_samples_equal_naive_rendering(name):
    tokenizer = chat_tokenizer(name)
    for seed in range(3):
        messages, tools = conversation(seed)
        fast = outcome_of(render_samples, messages, tokenizer, tools=tools)
        assert fast == outcome_of(naive_samples, messages, tokenizer, tools=tools)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_samples_of_the_shipped_tokenizer_equal_naive_rendering(variables):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    for seed in range(8):
        messages, tools = conversation(seed, num_turns=9)
        options = {"tools": tools, "chat_template_kwargs": variables}
        fast = outcome_of(render_samples, messages, tokenizer, **options)
        assert fast == outcome_of(naive_samples, messages, tokenizer, **options)


LOOPS = {  # templates with what a loop can depend on, and traps
    "plain": "{{ m.content }}",
    "place": "{{ loop.index }}/{{ loop.length }}/{{ loop.revindex0 }}{{ m.content }}",
    "ends": "{% if loop.first %}<{% endif %}{{ m.content }}{{ '>' if loop.last else ',' }}",
    "neighbours": "{{ loop.previtem.role if loop.previtem is defined else '-' }}{{ m.content }}",
    "next": "{% if not loop.last and messages[loop.index0 + 1].role == m.role %}={% endif %}"
    "{{ m.content }}",
    "wraps around": "{{ messages[loop.index0 - 1].content }}|{{ m.content }}",
    "counts": "{% set ns.count = ns.count + 1 %}{{ ns.count }}{{ m.content }}",
    "switches": "{% if ns.on and m.role == 'user' %}{% set ns.on = false %}"
    "{% set ns.at = loop.index0 %}{% endif %}{{ ns.on }}{{ m.content }}",
    "writes only": "{% if m.role == 'user' %}{% set ns.at = loop.index0 %}{% endif %}{{ m.role }}",
    "late guard": "{% set ns.on = m.role == 'user' %}{% if ns.on and loop.index0 > 1 %}"
    "{{ loop.index0 }}{% endif %}{{ m.content }}",
    "truth or number": "{{ loop.index0 and loop.last }}{{ loop.first or loop.index }}",
    "compares": "{% if loop.index0 > ns.last %}{{ m.content }}{% else %}-{% endif %}",
    "far away": "{% if loop.index == messages | length - 1 %}!{% endif %}{{ m.content }}",
    "shadow": "{% set last = last ~ m.role %}{{ last }}",
    "alias": "{% set n = messages | length - loop.index0 %}{% if ns.on and m.role == 'user' %}"
    "{% set ns.on = false %}{{ n }}{% endif %}{{ m.content }}",
    "alias of itself": "{% set last = last ~ '+' %}{% set more = last ~ '-' %}{{ more }}",
    "inner loop": "{% for x in m.content %}{{ loop.index }}{% if not loop.last %}.{% endif %}"
    "{% endfor %}{{ loop.index0 }}",
    "looks ahead": "{% for x in messages[loop.index:] %}{{ x.role[0] }}{% endfor %}{{ m.content }}",
    "skips": "{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}",
    "stops": "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}",
    "cycles": "{{ loop.cycle('a', 'b') }}{{ m.content }}",
    "changes": "{% if loop.changed(m.role) %}*{% endif %}{{ m.content }}",
    "macro": "{{ shout(m.content) }}",
    "macro counts": "{{ tick() }}{{ m.content }}",
    "namespace inside": "{% set own = namespace(x=0) %}{% for c in m.content %}"
    "{% set own.x = own.x + 1 %}{% endfor %}{{ own.x }}",
    "whole namespace": "{{ show(ns) }}{% set ns.count = ns.count + 2 %}",
    "list grows": "{% set ns.seen = ns.seen + [m.role] %}{{ ns.seen | join(',') }}",
    "lazy error": "{% if loop.index0 > 99 %}{{ messages[0].x.y }}{% endif %}{{ m.content }}",
    "block": "{% set text %}{{ m.content }}{{ loop.index }}{% endset %}{{ text | upper }}",
    "generation": "{% generation %}{{ m.content }}{{ loop.last }}{% endgeneration %}",
    "joiner": "{{ comma() }}{{ m.content }}",
}
BEFORE = (
    "{% macro shout(x) %}{{ x | upper }}{{ ns.count }}{{ last }}{% endmacro %}"
    "{% macro tick() %}{% set ns.count = ns.count + 1 %}{{ ns.count }}{% endmacro %}"
    "{% macro show(any) %}{{ any.count }}{% endmacro %}"
    "{% set last = 'none' %}{% set comma = joiner(',') %}"
    "{% set ns = namespace(count=0, on=true, at=0, last=messages | length - 3, seen=[]) %}"
)
AFTER = "{{ ns.count }}{{ ns.on }}{{ ns.at }}{% if add_generation_prompt %}>>{% endif %}"


@pytest.mark.parametrize("order", ["messages", "messages[::-1]", "messages[1:]"])
@pytest.mark.parametrize("body", LOOPS.values(), ids=LOOPS)
def test_remembered_loops_write_what_the_template_writes(body, order):
    source = f"{BEFORE}{{% for m in {order} %}}{body}{{% endfor %}}{AFTER}"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)

    def render(messages, template, **more):
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, **more
        )

    messages, _ = conversation(3)
    renderer = TurnRenderer(render, source)
    for end in [*range(1, len(messages) + 1), 3]:
        for prompt in (False, True):
            whole = render(messages[:end], source, add_generation_prompt=prompt)
            text = renderer.render(messages[:end], add_generation_prompt=prompt)
            assert text == whole


def test_a_long_conversation_runs_each_message_a_few_times():
    tokenizer = chat_tokenizer("qwen3")
    messages = [
        {"role": role, "content": f"{number}"}
        for number in range(40)
        for role in ("user", "assistant")
    ]
    template = ChatTemplate(tokenizer, remember=True)
    for end in range(1, len(messages) + 1):
        template.prompt(messages[:end])
    assert template.num_run < 5 * len(messages)


def test_most_templates_have_loops_that_are_remembered():
    sources = [path.read_text("utf-8") for path in template_files().values()]
    environment = _compiled("").environment
    listed = [source for source in sources if rewrite_loops(environment.parse(source))]
    assert len(listed) > 0.9 * len(sources)


def added(content, **flags):
    return AddedToken(content, **{"normalized": False, "special": True, **flags})


def small_tokenizer(kind, *tokens):
    """A tokenizer in which what a word becomes depends on what stands before it."""
    corpus = ["two and two is four, [x] and more and two", "ab abc abcd é 👍🏽 <|im_end|> <think>"]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="?", special_tokens=["?"])
    elif kind == "sentencepiece":
        backend = Tokenizer(models.BPE(unk_token="?", byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["?"])
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


TOKENS = {
    "plain": (added("<|im_end|>"), added("<think>")),
    "one within the other": (added("<|im"), added("<|im_end|>"), added("_end|>two")),
    "space on the right": (added("<|im_end|>", rstrip=True), added("<think>")),
    "space on the left": (added("<|im_end|>", lstrip=True), added("<think>")),
    "both": (added("<|im_end|>", lstrip=True, rstrip=True), added("<think>", rstrip=True)),
    "normalized": (added("<|im_end|>"), added("<think>", normalized=True, lstrip=True)),
    "single word": (added("<|im_end|>"), added("two", single_word=True)),
    "spaces": (added("<|im_end|>", rstrip=True), added("  ")),
}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("kind", ["unigram", "sentencepiece", "bytes"])
def test_pieces_equal_whole_texts(kind, tokens):
    tokenizer = small_tokenizer(kind, *tokens)

    @settings(max_examples=25)
    @given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, max_size=2))
    @example(["<|im_end|>  two", "  <|im_end|> two<think> "], ["", "<|im_end|>"])
    def check(parts, others):
        grown = ["".join(parts[:end]) for end in range(len(parts) + 1)]
        texts = [*grown, *others, *reversed(grown)]
        for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False)

    check()


def test_texts_stay_whole_where_pieces_cannot_be_proved():
    reasons = {
        name: why_whole(small_tokenizer("bytes", *tokens)) for name, tokens in TOKENS.items()
    }
    assert {name for name, reason in reasons.items() if reason} == {"single word", "spaces"}
    assert "no added token" in why_whole(small_tokenizer("bytes"))
    tokenizer = small_tokenizer("bytes", *TOKENS["plain"])
    tokenizer.split_special_tokens = True
    assert why_whole(tokenizer) == "split_special_tokens is on"


def test_a_tokenizer_class_with_its_own_encoding_gets_whole_texts():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **settings):
            return super()._encode_plus(text, *args, **settings)

    tokenizer = Own(tokenizer_object=small_tokenizer("bytes", *TOKENS["plain"]).backend_tokenizer)
    assert why_whole(tokenizer) == "Own has its own _encode_plus"
    assert encode_texts(tokenizer, ["two<think>"])[0].tolist() == tokenizer.encode("two<think>")
