"""Builds the shipped files of the demo: `python -m flexmask.demo.build`.

The conversations come from the generator, the tokenizer is trained on them, and the config
describes a model small enough to train on a laptop in a minute or two. Building again gives the
same bytes. The chat template, `assets/tokenizer/chat_template.jinja`, is written by hand and stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from flexmask.demo import CONFIG_PATH, DATA_PATH, TOKENIZER_PATH
from flexmask.demo.tutoring import conversations, to_jsonl

VOCAB_SIZE = 1792
END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Special tokens are left out of decoded text on request; tags are part of what the model says.
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
MAX_LENGTH = 4096


def main() -> None:
    """Writes all the files under `flexmask/demo/assets`."""
    TOKENIZER_PATH.mkdir(parents=True, exist_ok=True)
    records = list(conversations())
    DATA_PATH.write_text(to_jsonl(iter(records)), encoding="utf-8", newline="\n")
    tokenizer = train_tokenizer(records)
    files = {
        TOKENIZER_PATH / "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        TOKENIZER_PATH / "tokenizer_config.json": _to_json(tokenizer_config()),
        CONFIG_PATH: _to_json(model_config(tokenizer)),
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    for path in (DATA_PATH, *files):
        print(f"{path.stat().st_size:>10,} bytes  {path}")


def train_tokenizer(records: list[dict[str, Any]]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer trained on conversations; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS + TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(records), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def _texts(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yields what a chat template will show of the records."""
    for record in records:
        yield from map(json.dumps, record.get("tools", []))
        for message in record["messages"]:
            yield f"{message['role']}\n{message['content']}"
            yield message.get("reasoning_content", "")
            yield from (json.dumps(call["function"]) for call in message.get("tool_calls", []))


def tokenizer_config() -> dict[str, Any]:
    """Returns what transformers needs to know besides `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": MESSAGE_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
    }


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the config of a Qwen3 model of about one million parameters."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(MESSAGE_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "dtype": "float32",
    }


def _to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


if __name__ == "__main__":
    main()
