"""A tokenizer from disk, and a language model: from disk, with random weights, or with none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def slow_on_cpu(dtype: torch.dtype) -> str:
    """What is said of a 16-bit type on a CPU.

    A matrix product of 1024 x 512 x 512 took 17 times as long in bfloat16 as in float32 with AVX2
    (torch 2.13); a CPU with instructions for it (AMX) is another matter.
    """
    name = str(dtype).removeprefix("torch.")
    return f"torch computes in {name} many times slower than in float32 on most CPUs"


def load_tokenizer(source: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with the template of a Jinja file in place of its own.

    Raises:
        DataError: there is no such tokenizer, or no such file, or it holds no template.
        TemplateError: there is no chat template, or one with a mistake in it.
    """
    from transformers import AutoTokenizer

    from flexmask.data.jinja import CHATML, check_template, read_template

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer")
    files = {"tokenizer_config.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in files):
        raise DataError(  # of a config alone transformers makes a tokenizer that knows no words
            f"{source}: holds no tokenizer ({', '.join(sorted(files))}); name one with --tokenizer"
        )
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
        if chat_template == CHATML and "<|im_end|>" not in tokenizer.get_vocab():
            raise DataError(
                f"{source}: --chat_template {CHATML} ends turns with '<|im_end|>', which is no "
                "token of this tokenizer; add it, or name a Jinja file"
            )
    check_template(tokenizer, chat_template or source)
    return tokenizer


def load_model(
    source: str, dtype: str, *, from_config: bool = False, load_in_4bit: bool = False
) -> PreTrainedModel:
    """The language model of a folder or hub id, with attention that leaves nothing out.

    Args:
        source: the folder or hub id.
        dtype: of its weights, such as "float32"; "auto" for the checkpoint's.
        from_config: draw the weights at random instead of loading them.
        load_in_4bit: as NF4, quantized twice, which computes in `dtype`; to be frozen (QLoRA,
            arXiv 2305.14314).

    Raises:
        DataError: there is no such model.
    """
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from flexmask.model.checks import exact_attention

    what = "model config" if from_config else "model"
    config = load_pretrained(AutoConfig.from_pretrained, source, what)
    if from_config:
        return random_model(config, None if dtype == "auto" else getattr(torch, dtype))
    settings: dict[str, Any] = exact_attention(config)
    if load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=config.dtype if dtype == "auto" else dtype,
        )
    load = _auto_class(config).from_pretrained
    return load_pretrained(load, source, "model", dtype=dtype, **settings)


def load_pretrained(load: Callable[..., Any], source: str, what: str, **settings: Any) -> Any:
    """What `load(source)` gives, or a DataError of one line that names `source`."""
    try:
        return load(source, **settings)
    except Exception as error:  # what is loaded is foreign: loaders raise what they like
        raise DataError(f"{source}: cannot be loaded as a {what}: {one_line(error)}") from error


def random_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The language model that `config` describes; in its own dtype where None.

    Raises:
        DataError: no such model can be built.
    """
    from flexmask.model.checks import exact_attention

    settings = exact_attention(config) | ({} if dtype is None else {"dtype": dtype})
    try:
        return _auto_class(config).from_config(config, **settings)
    except Exception as error:  # a config is foreign: models raise what they like
        raise DataError(
            f"model_type {config.model_type!r}: no model can be built from this config: "
            f"{one_line(error)}"
        ) from error


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same with shapes and no weights, on the meta device."""
    import torch

    with torch.device("meta"):
        return random_model(config, dtype)


def _auto_class(config: PreTrainedConfig) -> Any:
    """What builds the model: some language models come only inside one of images and text."""
    import transformers

    kind = type(config)
    alone = kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not alone:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM
