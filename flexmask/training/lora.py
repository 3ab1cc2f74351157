"""LoRA adapters around the model of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError
from flexmask.training.options import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, config: TrainConfig) -> Any:
    """The model with trainable LoRA adapters around frozen weights.

    Raises:
        DataError: peft refuses a rank or a name of modules.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(config.lora_target_modules)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:  # a rank below 1, or modules that the model does not have
        raise DataError(f"--lora options: {str(error).splitlines()[0]}") from error
