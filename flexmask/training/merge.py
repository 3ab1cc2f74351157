"""The trained adapters merged into the model that they were trained on."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from flexmask.model.load import load_model
from flexmask.training.checkpoints import STAGING, checkpoint_errors
from flexmask.training.options import TrainConfig

MERGED = "merged"  # in the output folder


def save_merged(config: TrainConfig, seed: int, tokenizer: Any, generation: Any) -> None:
    """Write the model with the adapters saved in `config.output` to a folder there, and say so.

    The model is loaded anew, on the CPU: the trained one may be sharded, and is patched.

    Args:
        config: of the run.
        seed: before the model was loaded, which `from_config` draws its weights with.
        tokenizer: saved beside the model.
        generation: its generation settings.

    Raises:
        DataError: the disk is full, or cannot be written to.
    """
    from peft import PeftModel
    from transformers import set_seed

    output = Path(config.output)
    staged, final = output / STAGING / MERGED, output / MERGED
    set_seed(seed)
    base = load_model(config.model, config.dtype, from_config=config.from_config)
    model = PeftModel.from_pretrained(base, str(output)).merge_and_unload()
    model.generation_config = generation
    with checkpoint_errors(final):
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)
        staged.parent.rmdir()
    print(f"{final}: the model with its adapters merged into it", file=sys.stderr)
