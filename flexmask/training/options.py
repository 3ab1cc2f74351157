"""The options of a training run, beside the Trainer's own, and the adapters that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flexmask.data.files import OnBadLine
from flexmask.data.renderer import RENDERING, EmptyThinking, Renderer
from flexmask.data.samples import Weighting
from flexmask.data.thinking import ThinkingHistory
from flexmask.errors import DataError, need_packages, one_line
from flexmask.packing.fitting import Overflow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backend = Literal["auto", "reference", "cpu", "varlen", "flex", "triton"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def _option(help: str, metavar: str | None = None, **default: Any) -> Any:
    """A field with its help, and what stands for its value there."""
    return field(metadata={"help": help, "metavar": metavar}, **default)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What `flexmask train` needs beyond `transformers.TrainingArguments`.

    Each field is an option of that name; its help says what it means. Other commands take the
    options that they have in common from here too (`flexmask.tools.options`).
    """

    data: Sequence[str] = _option(
        "files, folders or patterns of conversations, folders of `datasets` or names on the Hub; "
        "DATA:2 counts twice in training; or first a YAML file of options: run.yaml",
        "DATA",
    )
    model: str = _option("folder or hub id of a model", "PATH_OR_ID")
    output: str = _option("a new folder for checkpoints and the trained model", "DIR")
    tokenizer: str | None = _option(
        "folder or hub id; default: the model's own", "PATH_OR_ID", default=None
    )
    chat_template: str | None = _option(
        "a Jinja file in place of the tokenizer's template, or the one that ships: chatml",
        "FILE",
        default=None,
    )
    chat_template_kwargs: Mapping[str, Any] | None = _option(
        "settings for the template, such as '{\"enable_thinking\": true}'", "JSON", default=None
    )
    thinking_history: ThinkingHistory = _option(
        "keep the thinking of earlier turns as the template does, until the next user message "
        "(interleaved), or for good (preserved)",
        default="template",
    )
    empty_thinking: EmptyThinking = _option(
        "for messages without thinking, train the empty thought that the template writes, or leave "
        "the conversation out",
        default="template",
    )
    date: str | None = _option(
        "that a template writes which writes today's, such as 2026-01-31; default: today, or that "
        "of the run to go on with",
        "DAY",
        default=None,
    )
    train_on_last_turn_only: bool = _option(
        "train only what follows the last user message, all steps of a tool loop", default=False
    )
    system: str | None = _option(
        "a system message for conversations that have none of their own", "TEXT", default=None
    )
    data_columns: Mapping[str, str] | None = _option(
        'what the data call each of flexmask\'s names, such as \'{"messages": "chat"}\'',
        "JSON",
        default=None,
    )
    split: str | None = _option(
        "of datasets, and of folders that name their files by split; default of datasets: train",
        "NAME",
        default=None,
    )
    eval_data: Sequence[str] | None = _option("conversations to evaluate on", "DATA", default=None)
    eval_data_split: str | None = _option(
        "the same for --eval_data; default of datasets: test", "NAME", default=None
    )
    eval_split: float = _option(
        "evaluate on this share of DATA instead, in [0, 1)", "SHARE", default=0.0
    )
    max_tokens: int | None = _option("budget of a packed row; default: no limit", "N", default=None)
    rows_per_batch: int | None = _option(
        "a process's batch is R rows of at most --max_tokens tokens, from the whole data; "
        "default with --max_tokens: 1, unless --per_device_train_batch_size is given",
        "R",
        default=None,
    )
    on_overflow: Overflow = _option(
        "what is larger than the budget is cut (split), cut and without samples longer than it "
        "(drop) or with their first tokens alone (truncate), or refused (error)",
        default="split",
    )
    weighting: Weighting = _option("what counts once in the loss", default="token")
    on_bad_line: OnBadLine = _option(
        "stop at a line that cannot be used, or skip and list it", default="error"
    )
    backend: Backend = _option(
        "of attention; auto: varlen or flex on a GPU, else cpu", default="auto"
    )
    kernel_options: Mapping[str, Any] | None = _option(
        "FlexAttention's, for --backend flex, such as '{\"BLOCK_M\": 64}'", "JSON", default=None
    )
    from_config: bool = _option("draw random weights from the model's config", default=False)
    sequence_parallel_size: int = _option(
        "processes that share the tokens of each row, which is dealt to all of them", "N", default=1
    )
    dtype: DType = _option("of the weights; auto: the checkpoint's", default="auto")
    use_peft: bool = _option("train LoRA adapters only", default=False)
    lora_r: int = _option("rank of the adapters", "R", default=16)
    lora_alpha: int = _option("they count A / R times", "A", default=32)
    lora_dropout: float = _option("must be 0", "P", default=0.0)
    lora_target_modules: Sequence[str] = _option(
        "which modules get adapters", "NAME", default=("all-linear",)
    )
    load_in_4bit: bool = _option(
        "hold the frozen weights under the adapters in 4 bits (QLoRA), by bitsandbytes",
        default=False,
    )
    log_token_metrics: bool = _option(
        "log mean_token_accuracy and entropy of trained tokens too", default=False
    )
    merge_lora: bool = _option("save the model with the adapters merged too", default=False)
    resume: bool = _option("go on from the last checkpoint, or begin", default=False)


def load_renderer(options: Any, default_tokenizer: str | None = None) -> Renderer:
    """The renderer that options describe: those of a command, or a `TrainConfig`.

    Args:
        options: what has fields of `TrainConfig`.
        default_tokenizer: where they name no tokenizer.

    Raises:
        DataError: there is no such tokenizer, or an option cannot be used.
        TemplateError: there is no chat template, or one with a mistake in it.
    """
    from flexmask.model.load import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer or default_tokenizer or "", options.chat_template)
    return make_renderer(options, tokenizer)


def make_renderer(options: Any, tokenizer: Any, **others: Any) -> Renderer:
    """The same with a tokenizer that is loaded already, and other settings than the options'."""
    given = {name: getattr(options, name) for name in RENDERING if hasattr(options, name)}
    return Renderer(tokenizer, **given | others)


def check_rendering(options: Any) -> None:
    """Raise DataError for options of rendering that no tokenizer makes good; loads none."""
    make_renderer(options, None, chat_template_kwargs=None)


def add_lora(model: PreTrainedModel, config: TrainConfig) -> Any:
    """The model with trainable LoRA adapters around frozen weights.

    Raises:
        DataError: peft refuses a rank or a name of modules.
    """
    need_packages("--use_peft", "peft")
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
