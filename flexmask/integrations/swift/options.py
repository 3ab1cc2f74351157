"""The options of `swift sft`: flexmask's own settings among them, and what is refused by name.

flexmask takes the place of ms-swift's pipelines of data and templates. Each of their options is
heeded, of no effect on what is trained, or refused unless it has its default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flexmask.data.dataset_split import DatasetSplit
from flexmask.data.prepared import is_prepared
from flexmask.data.renderer import RENDERING
from flexmask.data.sources import find_data_files
from flexmask.errors import DataError, UnsupportedModelError, did_you_mean
from flexmask.training.checks import check_config
from flexmask.training.options import TrainConfig

# Fields of `TrainConfig` that ms-swift has no option for.
SETTINGS = (
    *("max_tokens", "rows_per_batch", "on_overflow", "on_bad_line", "backend"),
    *("split", "eval_data_split"),
    *("kernel_options", "log_token_metrics"),
    *(name for name in RENDERING if name not in ("system", "train_on_last_turn_only")),
)

# Options for data and templates that are heeded, or are about how and in which order data are read:
# each epoch is shuffled anyway. The last three are looked at in `_refusals`.
_HEEDED = (
    *("dataset", "val_dataset", "split_dataset_ratio", "data_seed", "system"),
    *("dataset_num_proc", "load_from_cache_file", "dataset_shuffle", "val_dataset_shuffle"),
    *("disable_ignore_empty_think", "loss_scale", "template", "max_length"),
)
_DEFAULTS = {"use_chat_template": True, "truncation_strategy": "delete"}  # where None is given
_REPLACED = "flexmask reads the data, and renders them with the tokenizer's own chat template"
_REASONS = {
    "padding_free": "flexmask's rows are packed already",
    "sequence_parallel_size": "it cuts rows between processes, in which a tree loses its mask",
    "truncation_strategy": "what becomes of long samples is on_overflow of flexmask's settings",
    "streaming": "flexmask reads all data before it trains",
    "columns": "names of columns are data_columns of flexmask's settings",
    "strict": "flexmask stops at a bad line, unless its setting on_bad_line is 'skip'",
    "enable_thinking": "give it in chat_template_kwargs of flexmask's settings",
    "preserve_thinking": "what becomes of earlier thinking is thinking_history of its settings",
}

# What else has to have one value, and why.
_MUST_BE: dict[str, tuple[Any, str]] = {
    "rlhf_type": (None, "its losses know no trees; flexmask is for `swift sft`"),
    "task_type": ("causal_lm", "others have another loss"),
    "packing": (False, "its rows know no trees; flexmask packs by itself, give it max_tokens"),
    "tuner_backend": ("peft", "unsloth has an attention of its own"),
    "enable_dft_loss": (False, "it weighs the loss in another way"),
    "enable_channel_loss": (False, "it computes the loss anew, from labels that are not shifted"),
    "loss_type": (None, "it computes the loss anew, from labels that are not shifted"),
    "use_logits_to_keep": (False, "it counts on labels that are not shifted"),
    "predict_with_generate": (False, "flexmask evaluates the loss"),
    "eval_metric": (None, "flexmask evaluates the loss"),
    "eval_use_evalscope": (False, "it prompts with ms-swift's template, not the tokenizer's"),
    "group_by_length": (False, "it cannot see the lengths of trees; give flexmask max_tokens"),
    "train_dataloader_shuffle": (True, "rows are filled in random order"),
    "train_sampling_strategy": ("random", "rows are filled in random order"),
    "use_swift_lora": (False, "it has not been verified"),
    "use_flash_ckpt": (False, "flexmask writes checkpoints that are whole or not there"),
    "use_ray": (False, "it has not been verified"),
    "deepspeed_autotp_size": (None, "tensor parallelism has not been verified"),
}


def read_config(args: Any) -> TrainConfig:
    """What flexmask is told by the arguments of `swift sft`, and by its settings in `model_kwargs`.

    Raises:
        DataError: a setting that there is not, or with a value that it cannot have; no such data.
    """
    for name in SETTINGS:
        if name in args.model_kwargs:
            raise DataError(
                f"--model_kwargs: {name} must stand among flexmask's settings, as in "
                f'\'{{"flexmask": {{"{name}": {json.dumps(args.model_kwargs[name])}}}}}\''
            )
    settings = args.model_kwargs.get("flexmask", {})
    if not isinstance(settings, Mapping):
        raise DataError(f"--model_kwargs: flexmask must be an object of settings, got {settings!r}")
    for name, value in settings.items():
        _check_setting(name, value)
    settings = dict(settings)
    if settings.get("max_tokens") is not None and args.per_device_train_batch_size == 1:
        settings.setdefault("rows_per_batch", 1)
    elif settings.get("rows_per_batch") is not None and args.per_device_train_batch_size > 1:
        raise DataError(
            "flexmask's rows_per_batch and --per_device_train_batch_size (conversations) both say "
            "what a batch is; leave out one"
        )
    config = TrainConfig(
        data=args.dataset,
        model=args.model,
        output=str(args.output_dir),
        eval_data=args.val_dataset or None,
        eval_split=args.split_dataset_ratio,
        system=args.system,
        train_on_last_turn_only=args.loss_scale == "last_round",
        **settings,
    )
    check_config(config)
    _check_data(args.dataset, config.split, "train", args.use_hf)
    _check_data(args.val_dataset, config.eval_data_split, "test", args.use_hf)
    return config


def _check_data(data: Sequence[str], split: str | None, default_split: str, use_hf: bool) -> None:
    """Raise DataError for a name that stands for no data, or for other data in ms-swift."""
    if not data or is_prepared(data[0]):
        return
    for name in data:
        if "#" in name and not Path(name).exists():
            raise DataError(
                f"{name}: flexmask takes no number of conversations behind a name, but a weight: "
                f"{name.partition('#')[0]}:0.5 trains half of them"
            )
    for found in find_data_files(data, split, default_split=default_split):
        if isinstance(found, DatasetSplit) and found.split is not None and not use_hf:
            raise DataError(
                f"{found.name}: flexmask reads it from the Hugging Face Hub, ms-swift from "
                "ModelScope; give --use_hf true, or name files"
            )


def _check_setting(name: str, value: Any) -> None:
    """Raise DataError unless there is such a setting of this type."""
    if name not in SETTINGS:
        raise DataError(
            f"--model_kwargs: flexmask has no setting {name!r}{did_you_mean(name, SETTINGS)}; it "
            f"has {', '.join(SETTINGS)}"
        )
    kind = get_type_hints(TrainConfig)[name]
    if get_origin(kind) is Literal:
        is_right, what = value in get_args(kind), f"one of {get_args(kind)}"
    else:
        kinds = tuple(get_origin(each) or each for each in get_args(kind) or (kind,))
        is_right = type(value) in kinds or (Mapping in kinds and isinstance(value, dict))
        what = {int: "a number", str: "text", bool: "true or false"}.get(kinds[0], "an object")
    if not is_right:
        raise DataError(f"--model_kwargs: flexmask's {name} must be {what}, got {value!r}")


def check_options(args: Any) -> None:
    """Raise UnsupportedModelError for an option of ms-swift that would not train as it says."""
    for refusal in _refusals(args):
        raise UnsupportedModelError(refusal)


def _refusals(args: Any) -> Iterator[str]:
    from swift.arguments.base_args.data_args import DataArguments
    from swift.arguments.base_args.template_args import TemplateArguments

    for name, (must, reason) in _MUST_BE.items():
        yield from _unless(name, getattr(args, name, must), must, reason)
    if args.tuner_type not in ("full", "lora"):
        yield f"--tuner_type must be full or lora, got {args.tuner_type!r}; others are unverified"
    if args.tuner_type == "lora":
        yield from _unless("lora_dropout", args.lora_dropout, 0, "N-pass would drop others")
    if args.router_aux_loss_coef and args.gradient_checkpointing:
        yield (
            "--router_aux_loss_coef needs --gradient_checkpointing false: ms-swift's checkpointing "
            "is reentrant, in which the auxiliary loss of experts has no gradient"
        )
    if args.optimizer == "muonclip":
        yield "--optimizer muonclip watches an attention that flexmask replaces; take another"
    if str(args.init_weights).startswith("lora-ga"):
        yield "--init_weights lora-ga takes its gradients from ms-swift's rendering; take another"
    if args.model_meta.is_multimodal:
        yield (
            f"--model_type {args.model_type}: ms-swift puts its own inputs in the place of those "
            "of a model for images too, without the mask; use `flexmask train`"
        )
    templates = args.model_meta.template, *args.model_meta.candidate_templates
    if args.template not in templates:
        yield f"--template must be that of the model, got {args.template!r}; {_REPLACED}"
    if args.max_length != args.model_info.max_model_len:
        yield (
            f"--max_length must be left out, got {args.max_length}; the budget of a row is "
            "max_tokens of flexmask's settings, on_overflow says what becomes of longer samples"
        )
    if args.loss_scale.endswith("+ignore_empty_think"):
        yield (
            "--disable_ignore_empty_think true must be given: an empty thought that the template "
            "writes is trained, or flexmask's setting empty_thinking leaves the conversation out"
        )
    if args.loss_scale not in ("default", "last_round"):
        yield f"--loss_scale must be default or last_round, got {args.loss_scale!r}; {_REPLACED}"
    if not 0 <= args.split_dataset_ratio < 1:
        yield f"--split_dataset_ratio must be in [0, 1), got {args.split_dataset_ratio}"
    for option in (*fields(TemplateArguments), *fields(DataArguments)):
        if option.name not in _HEEDED:
            default = None if option.default is MISSING else option.default
            must = _DEFAULTS.get(option.name, default)
            reason = _REASONS.get(option.name, _REPLACED)
            yield from _unless(option.name, getattr(args, option.name), must, reason)


def _unless(option: str, value: Any, must: Any, reason: str) -> Iterator[str]:
    """The refusal of a value, unless it is the one that it must be; or none, where nothing must."""
    if value != must and (must or value not in (None, [], {})):
        text = str(must).lower() if isinstance(must, (bool, int, float, str)) else "left out"
        yield f"--{option} must be {text}, got {value!r}; {reason}"
