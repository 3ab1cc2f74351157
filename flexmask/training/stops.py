"""The special tokens that end trained turns, kept where generation looks for them.

A base model's settings know the end of a text, not of a turn. Trained on a chat template, it learns
to end turns and is not stopped there, unless `eos_token_id` of its generation settings says so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmask.data.template import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

_MOST_TREES = 1000


def trained_stops(trees: Any, tokenizer: Any) -> list[int]:
    """Ids of the special tokens with which samples end, ascending.

    Args:
        trees: rendered trees by index; of more than 1,000 that many are looked at, spread evenly.
        tokenizer: the one that they were rendered with.
    """
    special = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer, len(tokenizer))))
    found: set[int] = set()
    for index in np.linspace(0, len(trees) - 1, min(len(trees), _MOST_TREES), dtype=int).tolist():
        tree = trees[index]
        stops = (tree.token_starts + tree.lengths)[[leaf.segment for leaf in tree.leaves]]
        found.update(tree.input_ids[stops - 1].tolist())
    return sorted(found & special)


def add_stops(
    model: PreTrainedModel, tokenizer: Any, trees: Any, training: TrainingArguments
) -> None:
    """Let `model` stop at the tokens that end the turns of `trees`, and say so where it did not.

    They are added to `eos_token_id` of its generation settings, which are saved with it.
    """
    settings = model.generation_config
    if settings is None:
        return
    known = np.atleast_1d([] if settings.eos_token_id is None else settings.eos_token_id).tolist()
    missing = [stop for stop in trained_stops(trees, tokenizer) if stop not in known]
    if not missing:
        return
    settings.eos_token_id = [*map(int, known), *missing]
    if training.process_index == 0:
        names = ", ".join(f"{tokenizer.decode([stop])!r} ({stop})" for stop in missing)
        print(
            f"stop tokens: the data end turns with {names}, where the model would not have "
            f"stopped: eos_token_id of its generation settings is saved as {settings.eos_token_id}",
            file=sys.stderr,
        )
