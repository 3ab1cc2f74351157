"""What a training run is made of, beside the Trainer's own options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flexmask.data.weighting import Weighting
from flexmask.packing.overflow import Overflow


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What `flexmask train` needs beyond `transformers.TrainingArguments`.

    Attributes:
        model: a model's folder or hub id.
        data: files of conversations, folders and patterns of them, or a folder that `flexmask
            prepare` made.
        output: folder for checkpoints and the trained model; must be new, or hold a run to resume.
        tokenizer: folder or hub id; the model's own where None.
        chat_template: a Jinja file in place of the tokenizer's template, or None.
        chat_template_kwargs: settings for the template, or None; of a prepared folder its own.
        eval_data: what to evaluate on, likewise, or None.
        eval_split: share of the conversations of `data` held out for evaluation, in [0, 1).
        max_tokens: budget of a packed row, or None for one row per batch. Larger conversations are
            cut up front, and count as so many.
        rows_per_batch: each process's batch is that many rows of at most `max_tokens` tokens, from
            the whole data; None: `per_device_train_batch_size` conversations.
        on_overflow, weighting, on_bad_line: as in `TreeCollator` and `load_trees`.
        backend: attention backend, as in `patch`.
        from_config: draw the weights at random from the model's config instead of loading them.
        dtype: data type the model is loaded in: "auto", "float32", "bfloat16" or "float16".
        use_peft, lora_r, lora_alpha, lora_dropout, lora_target_modules: train LoRA adapters only.
        resume: go on from the last checkpoint in `output`; where there is none yet, begin.
    """

    model: str
    data: Sequence[str]
    output: str
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    eval_data: Sequence[str] | None = None
    eval_split: float = 0.0
    max_tokens: int | None = None
    rows_per_batch: int | None = None
    on_overflow: Overflow = "split"
    weighting: Weighting = "token"
    on_bad_line: Literal["error", "skip"] = "error"
    backend: str = "auto"
    from_config: bool = False
    dtype: str = "auto"
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: Sequence[str] = field(default=("all-linear",))
    resume: bool = False
