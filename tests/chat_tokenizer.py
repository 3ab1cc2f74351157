"""A small tokenizer with the control tokens of every chat template that is tested."""
# ruff: noqa: RUF001 (the control tokens of DeepSeek are written with full-width bars)

import copy
import inspect
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from deepseek_v4 import DeepSeekV4Tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# The beginning and end of text of the models that ship each template, by the start of its name.
_ENDS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<eos>"),
    "gemma": ("<bos>", "<eos>"),
    "glm": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "kimi_k2": ("[BOS]", "<|im_end|>"),
    "kimi_k3": ("[BOS]", "<|end_of_msg|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava_next": ("<s>", "</s>"),
    "minimax": ("]~!b[", "[e~["),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}
_SPECIAL = """
<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|START_RESPONSE|>
<|END_RESPONSE|> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜>
<｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜>
<｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> <start_of_turn> <end_of_turn>
<|turn> <turn|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> <tool_call|>
<|tool_response> <tool_response|> [gMASK] <sop> <|system|> <|user|> <|assistant|>
<|observation|> <|end|> <|start|> <|message|> <|channel|> <|call|> <|im_start|> <|im_end|>
<|tool_list_start|> <|tool_list_end|> <|tool_call_start|> <|tool_call_end|>
<|tool_response_start|> <|tool_response_end|> <|start_header_id|> <|end_header_id|>
<|eom_id|> <|python_tag|> <|eom|> <|patch|> <|video|> <|endoftext|> <|im_user|> <|im_assistant|>
<|im_system|> <|im_middle|> <|tool_calls_section_begin|> <|tool_calls_section_end|>
<|tool_call_begin|> <|tool_call_argument_begin|> <|open|> <|close|> <|sep|> <|end_of_msg|> ]~b]
]<]minimax[>[
"""
# Tokens of their own that are not special, as in Qwen3 and GLM-4.
_PLAIN = """
<think> </think> <mm:think> </mm:think> <tool_call> </tool_call> <tool_response> </tool_response>
<minimax:tool_call> </minimax:tool_call>
"""
_TEXT = ["The answer is that you think about the question and then call a tool for the user.\n\n"]


# Templates that differ in a line or two from another: its name, and the texts that are replaced.
_VARIANTS = {
    # Gemma 4 of 12B and more closes an empty thought in the prompt, where the small ones do not.
    "gemma4_v5_large": (
        "gemma4_v5",
        {
            "'tool_call' -%}\n        {{- '<|turn>model\\n'": "'tool_call' -%}\n"
            "{{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>')"
        },
    ),
    "kimi_k2_6": (
        "kimi_k2_thinking",
        {
            "if loop.index0 > answer.last": "if preserve_thinking or loop.index0 > answer.last",
            "assistant<|im_middle|>' if add": "assistant<|im_middle|><think>' + "
            "('</think>' if thinking is false else '') if add",
        },
    ),
}
# Tokenizers that have an encoder in place of a template.
_ENCODERS = {"deepseek_v4": DeepSeekV4Tokenizer}


@cache
def chat_templates() -> dict[str, str]:
    """The chat templates that are tested, by name: TRL's, those of `templates`, and an encoder."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folders = Path(spec.origin).parent / "chat_templates", Path(__file__).parent / "templates"
    files = [file for folder in folders for file in folder.glob("*.jinja")]
    texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    for name, (base, replaced) in _VARIANTS.items():
        texts[name] = texts[base]
        for old, new in replaced.items():
            assert texts[name].count(old) == 1, (name, old)
            texts[name] = texts[name].replace(old, new)
    texts |= {name: inspect.getsource(encoder) for name, encoder in _ENCODERS.items()}
    return {name: texts[name] for name in sorted(texts) if not name.endswith("_training")}


@cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the template `name`; shared, so not to be changed."""
    bos, eos = next(ends for start, ends in _ENDS.items() if name.startswith(start))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(_TEXT, trainer)
    kind = _ENCODERS.get(name, PreTrainedTokenizerFast)
    tokenizer = kind(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in _SPECIAL.split()])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in _PLAIN.split()])
    if name not in _ENCODERS:
        tokenizer.chat_template = chat_templates()[name]
    return tokenizer


def marking_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The same, but it writes a space before every text, as SentencePiece does."""
    tokenizer = copy.deepcopy(chat_tokenizer(name))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer
