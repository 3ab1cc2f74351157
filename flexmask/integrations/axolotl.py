"""The axolotl plugin: `axolotl train` on trees, for runs whose YAML has a `flexmask:` block.

axolotl finds it by the entry point group `axolotl.plugins`, and calls it in every run; without the
block it does nothing. With it flexmask reads and renders the data, and packs them; model, adapters,
optimizer, schedule, saving and logging are axolotl's. What would not equal N-pass is refused before
the data are read.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from flexmask.errors import UnsupportedModelError
from flexmask.training.options import TrainConfig

if TYPE_CHECKING:
    from flexmask.packing.collator import TreeCollator

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


def _check(cfg: Any) -> None:
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
                known = value == (cfg.get(name) or "tokenizer_default")  # as axolotl fills it in
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


def _config(cfg: Any) -> TrainConfig:
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


@cache
def _trainer_class() -> type:
    """TreeTrainer over the trainer of axolotl."""
    from axolotl.core.trainers import AxolotlTrainer
    from transformers import Trainer

    from flexmask.training.trainer import TreeTrainer

    class AxolotlTreeTrainer(TreeTrainer, AxolotlTrainer):
        def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer._get_dataloader(self, *args, **kwargs)  # axolotl's asks for columns

    return AxolotlTreeTrainer


class FlexmaskPlugin(BasePlugin):
    """Takes the place of axolotl's reader, collator and trainer where there is a `flexmask:` block.

    axolotl calls the hooks in the order in which they stand here.
    """

    _collator: TreeCollator | None = None  # of the data that were read

    def get_input_args(self) -> str:
        """The name of the class whose fields are added to axolotl's configuration."""
        return f"{__name__}.{FlexmaskArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The trees of the run, in axolotl's `TrainDatasetMeta`.

        Raises:
            FlexmaskError: the configuration would not equal N-pass, or data cannot be used.
        """
        if not cfg.get("flexmask"):
            return None
        _check(cfg)
        self._check_others(cfg)
        if preprocess:
            raise UnsupportedModelError(
                "axolotl preprocess: writes what axolotl has tokenised, and flexmask reads the "
                "conversations; leave it out, or name a folder of `flexmask prepare` as the path"
            )
        from accelerate import PartialState
        from axolotl.common.datasets import TrainDatasetMeta
        from axolotl.loaders import load_tokenizer
        from axolotl.utils.train import determine_last_checkpoint

        from flexmask.training.checks import check_config
        from flexmask.training.data import load_datasets, make_collator, settle_renderer
        from flexmask.training.options import make_renderer

        config = _config(cfg)
        check_config(config)
        renderer = make_renderer(config, load_tokenizer(cfg))
        renderer = settle_renderer(renderer, config, determine_last_checkpoint(cfg))
        ranks = PartialState()
        training: Any = SimpleNamespace(
            process_index=ranks.process_index,
            device=ranks.device,
            seed=cfg.get("seed") or 42,
            data_seed=None,
        )
        self._collator = make_collator(renderer, config, training)
        train_set, eval_set = load_datasets(config, self._collator, training)
        return TrainDatasetMeta(train_set, eval_set)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Patch the model, which has its adapters."""
        if not cfg.get("flexmask"):
            return
        from flexmask.model import patch

        config = _config(cfg)
        patch(model, backend=config.backend, kernel_options=config.kernel_options)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """TreeTrainer over axolotl's trainer."""
        if not cfg.get("flexmask"):
            return None
        if self._collator is None:
            raise UnsupportedModelError(
                "axolotl evaluate: reads data without asking plugins for them; take eval_loss from "
                "axolotl train, with test_datasets or val_set_size"
            )
        return _trainer_class()

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """What TrainingArguments have to say for a step to equal N-pass's."""
        if not cfg.get("flexmask"):
            return None
        # axolotl turns the average off: each process would weigh the tokens of its own batch.
        return {"average_tokens_across_devices": True, "remove_unused_columns": False}

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        """What makes the collator that the data were read with."""
        if not cfg.get("flexmask"):
            return None
        return (lambda *_, **__: self._collator), {}

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """What logs the first and the last step too."""
        if not cfg.get("flexmask"):
            return []
        from flexmask.training.trainer import LogEnds

        return [LogEnds()]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Let the trainer fill rows, and check what only it knows.

        Raises:
            FlexmaskError: an option of the Trainer cannot be honoured, or a token has no embedding.
        """
        if not cfg.get("flexmask"):
            return
        from flexmask.training.checks import check_token_ids, check_training_arguments
        from flexmask.training.data import make_batch_sampler
        from flexmask.training.run import freeze_unreached
        from flexmask.training.stops import add_stops

        if not trainer.model_accepts_loss_kwargs:
            raise UnsupportedModelError(
                f"{type(trainer.model).__name__}: axolotl does not hand its loss the weights of a "
                "whole step, so that each batch would count the same; train it with flexmask train"
            )
        config = _config(cfg)
        check_training_arguments(trainer.args, config)
        datasets = [data for data in (trainer.train_dataset, trainer.eval_dataset) if data]
        check_token_ids(trainer.model, trainer.processing_class, datasets)
        freeze_unreached(trainer.model, trainer.args)
        trainer.log_token_metrics = config.log_token_metrics
        trainer.batch_sampler = make_batch_sampler(
            config, trainer.args, trainer.train_dataset, trainer.model
        )
        added = add_stops(trainer.model, trainer.processing_class, trainer.train_dataset)
        if added and trainer.args.process_index == 0:
            print(added, file=sys.stderr)

    def _check_others(self, cfg: Any) -> None:
        """Raise UnsupportedModelError where another plugin takes the same places."""
        from axolotl.integrations.base import PluginManager

        for name, plugin in PluginManager.get_instance().plugins.items():
            if plugin is not self and (
                plugin.get_trainer_cls(cfg) or plugin.get_collator_cls_and_kwargs(cfg)
            ):
                raise UnsupportedModelError(
                    f"plugins: {name} brings a trainer or a collator of its own, in the place of "
                    "flexmask's; leave one of them out"
                )
