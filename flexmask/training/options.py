"""The options of a training run, beside the Trainer's own, and the adapters that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flexmask.data.samples import Weighting
from flexmask.errors import DataError, one_line
from flexmask.packing.fitting import Overflow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backend = Literal["auto", "reference", "cpu", "flex", "triton"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def _help(text: str, metavar: str | None = None) -> dict[str, str | None]:
    """The metadata of a field: its help, and what stands for its value there."""
    return {"help": text, "metavar": metavar}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What `flexmask train` needs beyond `transformers.TrainingArguments`.

    Each field is an option of that name; its help says what it means. Other commands take the
    options that they have in common from here too (`flexmask.tools.options`).
    """

    data: Sequence[str] = field(
        metadata=_help("files, folders or patterns of conversations", "DATA")
    )
    model: str = field(metadata=_help("folder or hub id of a model", "PATH_OR_ID"))
    output: str = field(metadata=_help("a new folder for checkpoints and the trained model", "DIR"))
    tokenizer: str | None = field(
        default=None, metadata=_help("folder or hub id; default: the model's own", "PATH_OR_ID")
    )
    chat_template: str | None = field(
        default=None, metadata=_help("a Jinja file in place of the tokenizer's template", "FILE")
    )
    chat_template_kwargs: Mapping[str, Any] | None = field(
        default=None,
        metadata=_help("settings for the template, such as '{\"enable_thinking\": true}'", "JSON"),
    )
    eval_data: Sequence[str] | None = field(
        default=None, metadata=_help("conversations to evaluate on", "DATA")
    )
    eval_split: float = field(
        default=0.0, metadata=_help("evaluate on this share of DATA instead, in [0, 1)", "SHARE")
    )
    max_tokens: int | None = field(
        default=None, metadata=_help("budget of a packed row; default: no limit", "N")
    )
    rows_per_batch: int | None = field(
        default=None,
        metadata=_help(
            "a process's batch is R rows of at most --max_tokens tokens, from the whole data; "
            "default with --max_tokens: 1, unless --per_device_train_batch_size is given",
            "R",
        ),
    )
    on_overflow: Overflow = field(
        default="split",
        metadata=_help(
            "what is larger than the budget is cut (split), cut and without samples longer than "
            "it (drop), or refused (error)"
        ),
    )
    weighting: Weighting = field(default="token", metadata=_help("what counts once in the loss"))
    on_bad_line: Literal["error", "skip"] = field(
        default="error", metadata=_help("stop at a line that cannot be used, or skip and list it")
    )
    backend: Backend = field(
        default="auto", metadata=_help("of attention; auto: flex on a GPU, else cpu")
    )
    from_config: bool = field(
        default=False, metadata=_help("draw random weights from the model's config")
    )
    dtype: DType = field(default="auto", metadata=_help("of the weights; auto: the checkpoint's"))
    use_peft: bool = field(default=False, metadata=_help("train LoRA adapters only"))
    lora_r: int = field(default=16, metadata=_help("rank of the adapters", "R"))
    lora_alpha: int = field(default=32, metadata=_help("they count A / R times", "A"))
    lora_dropout: float = field(default=0.0, metadata=_help("must be 0", "P"))
    lora_target_modules: Sequence[str] = field(
        default=("all-linear",), metadata=_help("which modules get adapters", "NAME")
    )
    resume: bool = field(default=False, metadata=_help("go on from the last checkpoint, or begin"))


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
        raise DataError(f"--lora options: {one_line(error)}") from error
