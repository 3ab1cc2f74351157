"""Commands run in this process, and the small folders and files that they work on."""

import json

import pytest
import torch
from transformers import AutoConfig

from flexmask.demo import CONFIG_PATH, DATA_PATH, TOKENIZER_PATH
from flexmask.tools.cli import main

ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
ONE_LAYER |= {"num_attention_heads": 2, "layer_types": ["full_attention"]}


def run(*arguments):
    """The exit code of `flexmask ARGUMENTS...`."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def write_model(folder, *, with_weights=False, **settings):
    """The folder, with a one-layer model's config and the shipped tokenizer in it."""
    from flexmask.model.load import random_model

    folder.mkdir(exist_ok=True)
    for file in TOKENIZER_PATH.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_config(folder, CONFIG_PATH, **ONE_LAYER | settings)
    if with_weights:
        torch.manual_seed(0)
        random_model(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def write_config(folder, path=CONFIG_PATH, **changes):
    """The config at `path` with some settings changed, written to a folder."""
    config = json.loads(path.read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def write_conversations(path, number, *, shortest=False):
    """The path, with the first or the shortest of the shipped conversations in it."""
    lines = DATA_PATH.read_text().splitlines(keepends=True)
    path.write_text("".join((sorted(lines, key=len) if shortest else lines)[:number]))
    return path
