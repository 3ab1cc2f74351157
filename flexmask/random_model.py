"""A model with random weights, or with none at all, from its config."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexmask.errors import DataError
from flexmask.model.checks import exact_attention


def random_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model that `config` describes; in its own dtype where None.

    Raises:
        DataError: no such model can be built.
    """
    settings = exact_attention(config) | ({} if dtype is None else {"dtype": dtype})
    try:
        return AutoModelForCausalLM.from_config(config, **settings)
    except Exception as error:  # a config is foreign: models raise what they like
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"model_type {config.model_type!r}: no model can be built from this config: {reason}"
        ) from error


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same with shapes and no weights, on the meta device."""
    with torch.device("meta"):
        return random_model(config, dtype)
