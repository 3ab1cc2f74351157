"""Samples of the models' own tokenizers, held to a rendering by hand.

The tokenizers are large and not in this repository: FLEXMASK_TOKENIZERS names a folder of
NAME/tokenizer.json.
"""

import os
from pathlib import Path

import pytest
from chat_cases import CASES, assert_equal_to_hand, chat_case
from chat_tokenizer import chat_templates, chat_tokenizer
from template_table import outcome, settings_of
from transformers import PreTrainedTokenizerFast

from flexmask.data.renderer import render_samples

FOLDER = Path(os.environ.get("FLEXMASK_TOKENIZERS", "no folder"))
NAMES = {
    "deepseek_v3_1": "deepseek_v3",
    "deepseekv3": "deepseek_v3",
    "gptoss": "gptoss",
    "llama3_1": "llama3_1",
    "qwen3": "qwen3",
    "qwen3_8": "qwen3",
}


@pytest.mark.filterwarnings("ignore:the chat template")  # announcements
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_real_tokenizers_equal_hand_rendered_turns(name):
    if not (file := FOLDER / NAMES[name] / "tokenizer.json").exists():
        pytest.skip(f"FLEXMASK_TOKENIZERS names no folder with {NAMES[name]}/tokenizer.json")
    small = chat_tokenizer(name)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=small.bos_token, eos_token=small.eos_token
    )
    tokenizer.chat_template = chat_templates()[name]
    for settings in settings_of(name):
        for case in CASES:
            if (verdict := outcome(name, case, settings).verdict) != "refused":
                messages, tools = chat_case(case)
                options = {"tools": tools, "chat_template_kwargs": settings}
                samples = render_samples(messages, tokenizer, **options)
                composed = verdict == "composed"
                assert_equal_to_hand(samples, tokenizer, name, case, settings, composed=composed)
