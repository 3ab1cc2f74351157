"""A model made ready for training: adapters, the patch, what text reaches, and what rounds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from flexmask.model.load import slow_on_cpu
from flexmask.training.options import TrainConfig, add_lora
from flexmask.training.sequence_parallel import make_group

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, TrainingArguments


def prepare_model(
    model: PreTrainedModel, config: TrainConfig, training: TrainingArguments
) -> PreTrainedModel:
    """The model patched, with adapters where they are asked for.

    Raises:
        FlexmaskError: a model that cannot be patched, or adapters that do not fit it.
    """
    from flexmask.model import patch

    if config.use_peft:
        if config.load_in_4bit:
            from peft import prepare_model_for_kbit_training

            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if training.gradient_checkpointing:
            model.enable_input_require_grads()
        model = add_lora(model, config)
    patch(
        model,
        backend=config.backend,
        kernel_options=config.kernel_options,
        sequence_group=make_group(training, config.sequence_parallel_size),
    )
    freeze_unreached(model, training)
    if training.process_index == 0:
        tell_rounding(model)
    return model


def freeze_unreached(model: nn.Module, training: TrainingArguments) -> None:
    """Train what text reaches of a patched model for images too, and say so."""
    from flexmask.model.structure import find_model, unreached_parameters

    unreached = [w for w in unreached_parameters(find_model(model)) if w.requires_grad]
    for weight in unreached:
        weight.requires_grad_(False)
    if unreached and training.process_index == 0:
        count = sum(weight.numel() for weight in unreached)
        print(f"frozen: {count:,} parameters that text does not reach", file=sys.stderr)


def tell_rounding(model: nn.Module) -> None:
    """Say so where weights are in a type that rounds small updates away, or slow on a CPU."""
    import torch

    first = next(model.parameters())
    if first.device.type == "cpu" and first.dtype.itemsize == 2:
        print(f"speed: {slow_on_cpu(first.dtype)}; give --dtype float32", file=sys.stderr)
    for dtype in {weight.dtype for weight in model.parameters() if weight.requires_grad}:
        if torch.finfo(dtype).bits < 32:
            name = str(dtype).removeprefix("torch.")
            print(
                f"rounding: weights are trained in {name}, which loses updates below about "
                f"1/{2 / torch.finfo(dtype).eps:.0f} of a weight; --dtype float32 keeps them, and "
                "with --bf16 computes in bfloat16 all the same",
                file=sys.stderr,
            )
