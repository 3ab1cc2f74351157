"""Messages prepared once and texts tokenised once: equal to rendering every prompt by itself."""

import random

import numpy as np
import pytest
from chat_cases import IN_PARTS, TOOL
from chat_tokenizer import chat_templates, chat_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexmask import render_samples
from flexmask.data import samples as samples_module
from flexmask.data.jinja import CompiledTemplate
from flexmask.data.renderer import Renderer
from flexmask.data.template import ChatTemplate
from flexmask.data.tokenize import encode_completion, encode_texts, why_whole
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import FlexmaskError, TemplateError

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


def outcome_of(messages, tokenizer, **options):
    """The samples as plain lists, or the error."""
    try:
        samples = render_samples(messages, tokenizer, **options)
        return [(s.key, s.input_ids.tolist(), s.loss_weights.tolist()) for s in samples]
    except FlexmaskError as error:
        return str(error)


def naive_outcome_of(messages, tokenizer, in_parts=False, **options):
    """The same with every text written by `apply_chat_template` and tokenised whole."""

    def render(template, messages, **prompt):
        own = [{k: v for k, v in message.items() if k != "train"} for message in messages]
        for message in own:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]
            if in_parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return template._tokenizer.apply_chat_template(own, **prompt, **template._common)

    def encode(tokenizer, texts):
        return [np.array(tokenizer.encode(t, add_special_tokens=False), int) for t in texts]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CompiledTemplate, "render", render)
        patched.setattr(samples_module, "encode_texts", encode)
        return outcome_of(messages, tokenizer, **options)


@pytest.mark.parametrize("name", chat_templates())
def test_samples_equal_naive_rendering(name):
    tokenizer = chat_tokenizer(name)
    for seed in range(3):
        messages, tools = conversation(seed)
        naive = naive_outcome_of(messages, tokenizer, name in IN_PARTS, tools=tools)
        assert outcome_of(messages, tokenizer, tools=tools) == naive


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_samples_of_the_shipped_tokenizer_equal_naive_rendering(variables):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    for seed in range(8):
        messages, tools = conversation(seed, num_turns=9)
        options = {"tools": tools, "chat_template_kwargs": variables}
        naive = naive_outcome_of(messages, tokenizer, **options)
        assert outcome_of(messages, tokenizer, **options) == naive


HARD = {
    "an aliased namespace": "{% set a = namespace(n=0) %}{% set b = a %}{% for m in messages %}"
    "{% set b.n = b.n + 1 %}{{ a.n }}{{ m.content }}{% endfor %}",
    "nested parentheses": "{% for m in messages %}"
    f"{{{{ {'(' * 20}loop.index{'+ 1)' * 20} }}}}{{% endfor %}}",
    "a macro named as an inner helper": "{% macro flexmask_capture(x) %}<{{ x }}>{% endmacro %}"
    "{% for m in messages %}{{ flexmask_capture(m.content) }}{{ loop.index }}{% endfor %}",
    "what it is given": "{{ tools is defined }}{{ documents is defined }}{{ tools }}{{ x }}{{ y }}"
    "{{ bos_token is defined }}{{ eos_token }}{{ flexmask_capture is defined }}"
    "{% for m in messages %}{{ m | tojson }}{% generation %}{{ m.role }}{% endgeneration %}"
    "{% endfor %}{{ add_generation_prompt }}",
}


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("source", HARD.values(), ids=HARD)
def test_slices_render_as_apply_chat_template_renders_them(source, tools):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tokenizer.chat_template = source
    settings = {"x": [1, {"a": None}]}
    template = CompiledTemplate(tokenizer, tools, settings)
    messages, _ = conversation(3)
    for end in [*range(1, len(messages) + 1), 3]:
        for prompt in (False, True):
            assert template.render(
                messages[:end], add_generation_prompt=prompt
            ) == tokenizer.apply_chat_template(
                messages[:end],
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **settings,
            )


@pytest.mark.parametrize("source", ["(" * 200 + "1" + ")" * 200, "x" + "+ x" * 400])
def test_a_template_that_python_cannot_nest_is_refused_in_one_line(source):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tokenizer.chat_template = "{{ " + source + " }}"
    with pytest.raises(TemplateError, match="no Jinja template: it is nested too deep; mend"):
        ChatTemplate(tokenizer)


def test_settings_that_the_template_does_not_read_are_refused_with_the_nearest_name():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    Renderer(tokenizer, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(TemplateError, match=r"sets 'enable_thinkin' .did you mean enable_thinkin"):
        Renderer(tokenizer, chat_template_kwargs={"enable_thinkin": True})
    tokenizer.chat_template = {"default": "{{ x }}", "tool_use": "{{ y }}"}
    Renderer(tokenizer, chat_template_kwargs={"x": 1, "y": 1})
    tokenizer.apply_chat_template = lambda messages, **settings: ""
    Renderer(tokenizer, chat_template_kwargs={"z": 1})


def test_each_message_is_prepared_once(monkeypatch):
    tokenizer = chat_tokenizer("qwen3")
    apply, prepared = PreTrainedTokenizerBase.apply_chat_template, []

    def counted(self, messages, **options):
        prepared.extend(messages)
        return apply(self, messages, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted)
    messages, _ = conversation(1, num_turns=20)
    template = ChatTemplate(tokenizer)
    texts = {template.prompt(messages[:end]) for end in range(1, len(messages) + 1)}
    assert len(prepared) == len(texts) == len(messages)


def test_a_tokenizer_with_its_own_apply_chat_template_is_asked_for_every_text():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tokenizer.apply_chat_template = lambda messages, **_: f"{len(messages)} messages"
    messages, _ = conversation(1)
    assert ChatTemplate(tokenizer).prompt(messages[:2]) == "2 messages"


def added(content, **flags):
    return AddedToken(content, **{"normalized": False, "special": True, **flags})


def small_tokenizer(kind, *tokens):
    """A tokenizer in which what a word becomes depends on what stands before it."""
    corpus = ["two and two is four, [x] and more and two", "ab abc abcd é 👍🏽 <|im_end|> <think>"]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="?", special_tokens=["?"])
    elif kind == "sentencepiece":
        backend = Tokenizer(models.BPE(unk_token="?", byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        spaces, begin = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        backend.decoder = decoders.Sequence([spaces, decoders.Fuse(), begin])
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["?"])
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
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


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("kind", ["unigram", "sentencepiece", "bytes"])
def test_completions_continue_the_prompt_and_spell_the_text(kind, tokens):
    tokenizer = small_tokenizer(kind, *tokens)

    @settings(max_examples=25)
    @given(TEXTS, TEXTS)
    @example("two and  ", "[x]")
    @example("two", "two")
    def check(prompt, completion):
        context, whole = encode_texts(tokenizer, [prompt, prompt + completion])
        try:
            ids = encode_completion(tokenizer, context, whole, completion)
        except TemplateError:  # a control token that prompt and completion make together
            assume(False)
        found = tokenizer.decode([*context, *ids])
        assert found in (tokenizer.decode(whole), tokenizer.decode(context) + completion)

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
