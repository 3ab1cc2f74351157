"""What TensorBoard and wandb are told once a run, beside the arguments of the Trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from flexmask import __version__
from flexmask.backends.choice import BackendChoice, choose_backend
from flexmask.model.adapter import requested_backend


def describe_run(
    trainer: Any, batch: Mapping[str, Any], choices: Iterable[BackendChoice]
) -> dict[str, str]:
    """`flexmask_version`, and `backend` for trees, `template_digest` where a template renders.

    Args:
        trainer: a TreeTrainer.
        batch: which it has trained on.
        choices: the backends that were called for it, most often first; none where the model is
            compiled, then `backend` is that of a usual call.
    """
    names = [choice.name for choice in choices]
    if not names and "subtree_end" in batch:
        names = [choose_backend(trainer.args.device, requested_backend(trainer.model)).name]
    about = {"flexmask_version": __version__}
    if names:
        about["backend"] = ", ".join(dict.fromkeys(names))
    tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if template := getattr(tokenizer, "chat_template", None):
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        about["template_digest"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return about


def report_run(callbacks: Iterable[Any], about: dict[str, str]) -> None:
    """Hand this to the reporters among a Trainer's callbacks: texts in TensorBoard, wandb's config.

    Only the main process has reporters that are open.
    """
    for callback in callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            for name, text in about.items():
                writer.add_text(name, text)
        wandb: Any = getattr(callback, "_wandb", None)
        if getattr(wandb, "run", None) is not None:
            wandb.config.update(about, allow_val_change=True)
