"""The data of a training run: read, held to the budget, and dealt out in batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.backends.flex_tables import BLOCK
from flexmask.data.files import Ranks
from flexmask.data.prepared import PreparedDataset, is_prepared, open_prepared, read_manifest
from flexmask.data.renderer import Renderer
from flexmask.data.sources import find_data_files
from flexmask.data.trees import TreeDataset, load_trees, repeat_by_weight, split_dataset
from flexmask.data.unused import describe_unused
from flexmask.errors import first_of, pluralize
from flexmask.packing.collator import TreeCollator
from flexmask.packing.fitting import FittedTrees
from flexmask.packing.sampler import TreeBatchSampler
from flexmask.training.options import TrainConfig
from flexmask.training.resume import read_settings
from flexmask.training.sequence_parallel import pad_for_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

Trees = TreeDataset | PreparedDataset


def settle_renderer(renderer: Renderer, config: TrainConfig, checkpoint: str | None) -> Renderer:
    """The renderer with the date of the data or run to go on with, and the data's settings.

    Args:
        renderer: as the options say; what they leave open is settled.
        config: which may name a prepared folder.
        checkpoint: to resume from, or None.
    """
    begun: Mapping[str, Any] = {}
    if is_prepared(config.data[0]):
        begun = read_manifest(Path(config.data[0]))
        if renderer.chat_template_kwargs is None:
            renderer = replace(renderer, chat_template_kwargs=begun["chat_template_kwargs"])
    elif checkpoint is not None:
        begun = read_settings(checkpoint) or {}
    return renderer.dated(begun.get("date"))


def make_collator(
    renderer: Renderer, config: TrainConfig, training: TrainingArguments
) -> TreeCollator:
    """The collator of a run, which pads for its device and processes; says how it renders."""
    if training.process_index == 0:
        print(f"thinking of earlier turns: {renderer.thinking_text}", file=sys.stderr)
    return TreeCollator(
        renderer.tokenizer,
        max_tokens=config.max_tokens,
        on_overflow=config.on_overflow,
        pad_to_multiple_of=lcm(
            BLOCK if training.device.type == "cuda" else 1,
            pad_for_shards(config.sequence_parallel_size),
        ),
        **renderer.settings,
    )


def load_datasets(
    config: TrainConfig, collator: TreeCollator, training: TrainingArguments
) -> tuple[Trees | FittedTrees, Trees | FittedTrees | None]:
    """The training set and, where asked for, the evaluation set; says what each holds.

    With a budget, all of their trees meet it.
    """
    seed = _data_seed(training)
    train_set = _load(config.data, config, collator, training)
    eval_set = None
    if config.eval_data is not None:
        eval_set = _load(config.eval_data, config, collator, training, is_eval=True)
        eval_set = repeat_by_weight(eval_set, seed)
    elif config.eval_split:  # first, or both would hold what is repeated
        eval_set, train_set = split_dataset(train_set, config.eval_split, seed)
    num_read = len(train_set)
    if training.process_index == 0 and eval_set is not None and config.eval_data is None:
        held = pluralize(len(eval_set), "conversation")
        print(f"evaluation: {held} held out, {num_read:,} left to train", file=sys.stderr)
    train_set = repeat_by_weight(train_set, seed)
    if training.process_index == 0 and len(train_set) != num_read:
        named = pluralize(num_read, "conversation")
        print(f"weights: of {named} an epoch trains {len(train_set):,}", file=sys.stderr)
    return (
        _fit(train_set, "training", config, training),
        eval_set and _fit(eval_set, "evaluation", config, training),
    )


def make_batch_sampler(
    config: TrainConfig, training: TrainingArguments, train_set: Any, model: PreTrainedModel
) -> TreeBatchSampler | None:
    """The sampler that fills rows by the model's cost, or None for batches of conversations."""
    if config.rows_per_batch is None or config.max_tokens is None:
        return None
    from flexmask.model.cost import CostModel

    cost = CostModel.of(model)
    costs = None  # of trees, where windows and chunks have to be counted for each
    if cost.windows:
        costs = [cost.tree_cost(train_set[index]) for index in range(len(train_set))]
    sampler = TreeBatchSampler(
        train_set,
        max_tokens=config.max_tokens,
        rows_per_batch=config.rows_per_batch,
        num_processes=training.world_size // config.sequence_parallel_size,
        pairs_per_token=cost.pairs_per_token,
        costs=costs,
        seed=_data_seed(training),
    )
    if training.process_index == 0:
        print(f"batches: {sampler.plan()}", file=sys.stderr)
    return sampler


@contextmanager
def ranks_on_cpu() -> Iterator[Ranks]:
    """The processes of this job, which exchange Python objects over gloo: no GPU is involved."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        yield Ranks()
        return
    group = distributed.new_group(backend="gloo")
    size = distributed.get_world_size()

    def gather(own: Any) -> list[Any]:
        everyone = [None] * size
        distributed.all_gather_object(everyone, own, group)
        return everyone

    try:
        yield Ranks(distributed.get_rank(), size, gather)
    finally:
        distributed.destroy_process_group(group)


def _data_seed(training: TrainingArguments) -> int:
    return training.seed if training.data_seed is None else training.data_seed


def _fit(
    dataset: Trees, name: str, config: TrainConfig, training: TrainingArguments
) -> Trees | FittedTrees:
    """The dataset with nothing larger than the budget; says what was cut and what was dropped."""
    if config.max_tokens is None:
        return dataset
    fitted = FittedTrees(dataset, config.max_tokens, on_overflow=config.on_overflow)
    if training.process_index == 0 and fitted.split.trees:
        print(f"{name}, over {config.max_tokens:,} tokens: {fitted.split}", file=sys.stderr)
        reason = too_long = "longer than max_tokens"
        if config.on_overflow == "truncate":
            reason = "nothing trained in its first max_tokens tokens"
        _list([f"dropped {where}, message {key}: {reason}" for where, key in fitted.dropped])
        _list([f"truncated {where}, message {key}: {too_long}" for where, key in fitted.truncated])
    return fitted


def _list(lines: Sequence[str]) -> None:
    for line in first_of(lines):
        print(f"  {line}", file=sys.stderr)


def _load(
    data: Sequence[str],
    config: TrainConfig,
    collator: TreeCollator,
    training: TrainingArguments,
    *,
    is_eval: bool = False,
) -> Trees:
    from tqdm import tqdm

    is_main = training.process_index == 0

    dataset: Trees
    if len(data) == 1 and is_prepared(data[0]):
        settings = collator.renderer.settings
        dataset = open_prepared(data[0], collator.tokenizer, **settings)
    else:
        split = config.eval_data_split if is_eval else config.split
        files = find_data_files(data, split, default_split="test" if is_eval else "train")
        with ranks_on_cpu() as ranks:
            dataset = load_trees(
                files,
                collator.renderer,
                on_bad_line=config.on_bad_line,
                ranks=ranks,
                progress=partial(tqdm, desc="reading", unit=" conversations", disable=not is_main),
            )
    if is_main:
        print(f"{', '.join(data)}: {dataset.summary()}", file=sys.stderr)
        if dataset.unused_keys:
            print(f"  {describe_unused(dataset.unused_keys)}", file=sys.stderr)
        _list([f"skipped {bad.reason}" for bad in dataset.bad_lines])
    return dataset
