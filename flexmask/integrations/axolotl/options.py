"""The `flexmask:` block of axolotl's YAML, and the keys of axolotl that are refused with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from flexmask.errors import UnsupportedModelError
from flexmask.training.options import TrainConfig

# Fields of TrainConfig that are keys of the block; for the others axolotl has keys of its own.
_KEYS = (
    *("max_tokens", "on_overflow", "weighting", "on_bad_line", "backend", "kernel_options"),
    *("thinking_history", "empty_thinking", "date", "train_on_last_turn_only", "system"),
    *("data_columns", "log_token_metrics"),
)
_OPTIONS = {option.name: option for option in dataclasses.fields(TrainConfig)}
_HINTS = get_type_hints(TrainConfig)
_FIELDS: dict[str, Any] = {
    name: (
        _HINTS[name],
        Field(default=_OPTIONS[name].default, description=_OPTIONS[name].metadata["help"]),
    )
    for name in _KEYS
}
FlexmaskBlock = create_model("FlexmaskBlock", __config__=ConfigDict(extra="forbid"), **_FIELDS)


class FlexmaskArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    flexmask: FlexmaskBlock | None = Field(  # type: ignore[valid-type]
        default=None, description="train on trees of conversations, exactly as N-pass"
    )

    @field_validator("flexmask", mode="before")
    @classmethod
    def _take_empty(cls, block: Any) -> Any:
        return {} if block is None else block  # `flexmask:` alone


_MODE = "flexmask trains on whole conversations, by the cross-entropy of what is trained in them"
_ROWS = "max_tokens of the flexmask block fills rows, from all conversations"
_READER = "flexmask reads and renders the data"
_TOKENS = "it reads rows that axolotl has tokenised, of which there are none"
_ATTENTION = "it replaces the attention in which the tree is seen"
_LOSS = "the loss would not be N-pass's"
_PROCESSES = "every process trains rows of its own, whole ones"

# Keys of axolotl that have to be left out, and why.
_REFUSED = {
    "rl": _MODE,
    "reward_model": _MODE,
    "process_reward_model": _MODE,
    "diffusion_lm": _MODE,
    "pretraining_dataset": _MODE,
    "processor_type": _MODE,
    "trainer_cls": "the trainer is TreeTrainer over axolotl's own",
    "streaming": "rows are filled from all conversations, so they are read first",
    "sample_packing": _ROWS,
    "eval_sample_packing": _ROWS,
    "batch_flattening": _ROWS,
    "balance_labels": _ROWS,
    "group_by_length": _ROWS,
    "pad_to_sequence_len": _ROWS,
    "excess_length_strategy": "on_overflow of the flexmask block says what becomes of long samples",
    "use_pose": "the position of a token is its depth in the tree",
    "eot_tokens": "the chat template ends turns, and what it ends them with is trained",
    "train_on_inputs": "what is trained is what the model writes at inference",
    "dataset_exact_deduplication": _READER,
    "dataset_shard_num": _READER,
    "min_sample_len": _READER,
    "skip_prepare_dataset": _READER,
    "push_dataset_to_hub": _READER,
    "do_bench_eval": _TOKENS,
    "do_causal_lm_eval": _TOKENS,
    "generate_samples": _TOKENS,
    "eval_table_size": _TOKENS,
    "fix_untrained_tokens": _TOKENS,
    "gemma4_hybrid_attn_impl": _ATTENTION,
    "scaling_softmax": _ATTENTION,
    "neftune_noise_alpha": "N-pass would draw other noise",
    "lora_dropout": "N-pass would drop others",
    "fp8": "its scales are those of a whole batch, and N-pass has other batches",
    "use_eaft": _LOSS,
    "use_dft": _LOSS,
    "orpo_alpha": _LOSS,
    "chunked_cross_entropy": _LOSS,
    "cut_cross_entropy": _LOSS,
    "flash_attn_cross_entropy": _LOSS,
}
# Keys that have to have one of these values, None where they are left out; and why.
_ALLOWED: dict[str, tuple[set[Any], str]] = {
    "context_parallel_size": ({None, 1}, _PROCESSES),
    "tensor_parallel_size": ({None, 1}, _PROCESSES),
    "expert_parallel_size": ({None, 1}, _PROCESSES),
    "adapter": ({None, "lora", "qlora"}, "other adapters have not been held to N-pass"),
    "attn_implementation": (
        {None, "eager", "sdpa", "flex_attention"}
        | {f"flash_attention_{version}" for version in (2, 3, 4, "torch")},
        _ATTENTION,
    ),
}
# The same of an entry of `datasets`.
_ENTRY: dict[str, tuple[set[Any], str]] = {
    "type": ({None, "chat_template"}, "conversations are rendered by the chat template"),
    "ds_type": ({None, "json", "parquet"}, "the ending of a file says what it is"),
    "field_messages": (
        {None, "messages", "conversations"},
        "data_columns of the flexmask block has the names of columns",
    ),
}
_MAPPINGS = {"role": {"role", "from"}, "content": {"content", "value"}}  # that are found unasked


def check_options(cfg: Any) -> None:
    """Raise UnsupportedModelError for a configuration that would not equal N-pass."""
    for key, reason in _REFUSED.items():
        if cfg.get(key):
            raise UnsupportedModelError(
                f"{key}: must be left out with flexmask, got {cfg[key]!r}; {reason}"
            )
    _check_allowed("", cfg, _ALLOWED)
    if cfg.get("val_set_size") and cfg.val_set_size >= 1:
        raise UnsupportedModelError(
            f"val_set_size: must be a share below 1 with flexmask, got {cfg.val_set_size}; give "
            "that, or test_datasets"
        )
    if cfg.get("curriculum_sampling") and cfg.flexmask.get("max_tokens"):
        raise UnsupportedModelError(
            "curriculum_sampling: must be left out with flexmask's max_tokens, got True; rows are "
            "filled in random order"
        )


def _check_allowed(where: str, given: Any, allowed: dict[str, tuple[set[Any], str]]) -> None:
    for key, (values, reason) in allowed.items():
        if given.get(key) not in values:
            known = ", ".join(sorted(str(value) for value in values if value is not None))
            raise UnsupportedModelError(
                f"{where}{key}: must be one of {known} with flexmask, got {given[key]!r}; {reason}"
            )


def _paths(key: str, cfg: Any) -> list[str]:
    """The entries of `datasets` or `test_datasets` as flexmask names data, with their weights."""
    paths = []
    for index, entry in enumerate(cfg.get(key) or ()):
        where = f"{key}[{index}]."
        _check_allowed(where, entry, _ENTRY)
        for name, value in entry.items():
            if name == "message_property_mappings":
                known = all(value[role] in _MAPPINGS.get(role, {role}) for role in value)
            elif name in ("chat_template", "chat_template_jinja"):
                known = value in ("tokenizer_default", cfg.get(name))  # as axolotl fills it in
            else:
                known = name in ("path", "split", "weight", *_ENTRY) or value is False
            if not known:
                raise UnsupportedModelError(
                    f"{where}{name}: must be left out with flexmask, got {value!r}; {_READER}, "
                    "see docs/formats.md"
                )
        weight = entry.get("weight")
        paths.append(entry["path"] if weight is None else f"{entry['path']}:{weight:g}")
    return paths


def _split(key: str, cfg: Any) -> str | None:
    """The split that all entries of `datasets` or `test_datasets` name, or None."""
    entries = cfg.get(key) or ()
    splits = {entry.get("split") for entry in entries}
    if len(splits) > 1:
        raise UnsupportedModelError(
            f"{key}: split must be the same in all entries with flexmask, got "
            f"{', '.join(sorted(map(str, splits)))}; name the files of the splits"
        )
    if splits == {"train"} and all(Path(entry["path"]).is_file() for entry in entries):
        return None  # which axolotl takes every file for
    return next(iter(splits), None)


def read_config(cfg: Any) -> TrainConfig:
    """The run as flexmask's own options describe it."""
    block = cfg.flexmask.to_dict()
    return TrainConfig(
        data=_paths("datasets", cfg),
        model=cfg.base_model,
        output=cfg.output_dir,
        chat_template_kwargs=cfg.get("chat_template_kwargs"),
        split=_split("datasets", cfg),
        eval_data=_paths("test_datasets", cfg) or None,
        eval_data_split=_split("test_datasets", cfg),
        eval_split=cfg.get("val_set_size") or 0.0,
        rows_per_batch=cfg.micro_batch_size if block.get("max_tokens") else None,
        **block,
    )
