"""Resuming: the settings that decide which data each step trains, kept in the checkpoints.

A resumed run skips as many batches as were trained, and goes on. With another number of processes,
another budget or other data these are other batches: some of the data would be trained twice, some
never, and nothing would say so. So such a run is refused.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import has_length

from flexmask.data.messages import Conversation
from flexmask.data.prepared import PreparedDataset
from flexmask.data.tokenize import tokenizer_fingerprint
from flexmask.data.trees import TreeDataset
from flexmask.errors import DataError, pluralize
from flexmask.packing.collator import TreeCollator
from flexmask.packing.fitting import FittedTrees
from flexmask.packing.sampler import TreeBatchSampler
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree

SETTINGS_FILE = "flexmask.json"  # in a checkpoint


def batch_settings(
    training: Any,
    dataset: Any,
    collator: Any,
    batch_sampler: TreeBatchSampler | None,
    *,
    num_processes: int,
) -> dict[str, Any]:
    """The settings that the batches of a run and their losses follow from, as plain data.

    Args:
        training: TrainingArguments.
        dataset: what it trains on; see `describe_data` for what is known of it.
        collator: of the training; settings of a TreeCollator are recorded.
        batch_sampler: what fills its batches, None for the Trainer's own.
        num_processes: how many are dealt different batches.
    """
    settings = {
        "data": describe_data(dataset),
        "processes": num_processes,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "seed": training.seed,
        "data_seed": training.data_seed,
    }
    if batch_sampler is None:
        for name in (
            "per_device_train_batch_size",
            "dataloader_drop_last",
            "train_sampling_strategy",
        ):
            settings[name] = getattr(training, name, None)
    else:
        settings["rows_per_batch"] = batch_sampler.rows_per_batch
    if isinstance(collator, TreeCollator):
        for name in ("max_tokens", "on_overflow"):
            settings[name] = getattr(collator, name)
        settings |= collator.renderer.settings
        if collator.tokenizer is not None:
            settings["tokenizer"] = tokenizer_fingerprint(collator.tokenizer)
    return json.loads(json.dumps(settings, default=str))


def read_settings(checkpoint: str | Path) -> dict[str, Any] | None:
    """The `batch_settings` of the run that wrote a checkpoint; None if it does not hold them."""
    path = Path(checkpoint) / SETTINGS_FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def check_resumable(checkpoint: str | Path, settings: Mapping[str, Any]) -> None:
    """Raise DataError unless the checkpoint is of a run with these `batch_settings`.

    A checkpoint that does not hold them, of another trainer, is taken with a warning.
    """
    begun = read_settings(checkpoint)
    if begun is None:
        warnings.warn(
            f"{checkpoint}: does not say with what data and batches it was trained; see to it that "
            "they are the same now",
            stacklevel=2,
        )
        return
    changed = [
        f"{name} was {begun.get(name)!r}, is {settings.get(name)!r}"
        for name in {**begun, **settings}
        if begun.get(name) != settings.get(name)
    ]
    if changed:
        raise DataError(
            f"{checkpoint}: the run would go on with other batches than it began with: "
            f"{', '.join(changed)}; resume it as it was begun, or begin a new run from the weights "
            "of this checkpoint, in another output folder"
        )


def describe_data(dataset: Any) -> str:
    """How much a dataset holds, and a digest of it where its contents are known to flexmask.

    That is for prepared folders, and for lists of whatever a TreeCollator takes.
    """
    if not has_length(dataset):
        return "a stream"
    held = dataset.trees if isinstance(dataset, FittedTrees) else dataset
    digest = None
    if isinstance(held, PreparedDataset):
        digest = held.digest()
    elif isinstance(held, (TreeDataset, list, tuple)):
        digest = _digest_of(held[index] for index in range(len(held)))
    count = pluralize(len(held), "conversation")
    return count if digest is None else f"{count} with the digest {digest}"


def _digest_of(items: Iterable[Any]) -> str | None:
    """A digest of the items in their order; None if one of them is of no known kind."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        contents = _contents(item)
        if contents is None:
            return None
        digest.update(hashlib.blake2b(contents).digest())
    return digest.hexdigest()


def _contents(item: Any) -> bytes | None:
    """All of an item that training looks at; None for an item of no known kind."""
    if isinstance(item, PrefixTree) and item.input_ids is not None:
        parents = [-1 if segment.parent is None else segment.parent for segment in item.segments]
        leaves = [leaf.segment for leaf in item.leaves]
        weights = [leaf.weights for leaf in item.leaves if leaf.weights is not None]
        counts = [one.size for one in weights]
        structure = json.dumps([item.lengths.tolist(), parents, leaves, counts]).encode()
        return b"".join((structure, item.input_ids.tobytes(), *(w.tobytes() for w in weights)))
    if isinstance(item, (list, tuple)) and all(isinstance(part, Sample) for part in item):
        return b"".join(s.input_ids.tobytes() + s.loss_weights.tobytes() for s in item)
    if isinstance(item, Conversation):
        item = [item.messages, item.tools]
    try:
        return json.dumps(item).encode()
    except TypeError:
        return None
