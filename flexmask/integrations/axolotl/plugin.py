"""The axolotl plugin: `axolotl train` on trees, for runs whose YAML has a `flexmask:` block.

axolotl finds it by the entry point group `axolotl.plugins`, and calls it in every run; without the
block it does nothing. With it flexmask reads and renders the data, and packs them; model, adapters,
optimizer, schedule, saving and logging are axolotl's. What would not equal N-pass is refused before
the data are read.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin

from flexmask.errors import UnsupportedModelError
from flexmask.integrations.axolotl.options import FlexmaskArgs, check_options, read_config
from flexmask.integrations.ending import end_in_one_line

if TYPE_CHECKING:
    from flexmask.packing.collator import TreeCollator


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
        return f"{FlexmaskArgs.__module__}.{FlexmaskArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The trees of the run, in axolotl's `TrainDatasetMeta`.

        Raises:
            FlexmaskError: the configuration would not equal N-pass, or data cannot be used.
        """
        if not cfg.get("flexmask"):
            return None
        end_in_one_line()
        check_options(cfg)
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

        from flexmask.training.checks import check_backend, check_config
        from flexmask.training.data import load_datasets, make_collator, settle_renderer
        from flexmask.training.options import make_renderer

        config = read_config(cfg)
        check_config(config)
        ranks = PartialState()
        training: Any = SimpleNamespace(
            process_index=ranks.process_index,
            device=ranks.device,
            seed=cfg.get("seed") or 42,
            data_seed=None,
        )
        check_backend(training, config)
        renderer = make_renderer(config, load_tokenizer(cfg))
        renderer = settle_renderer(renderer, config, determine_last_checkpoint(cfg))
        self._collator = make_collator(renderer, config, training)
        train_set, eval_set = load_datasets(config, self._collator, training)
        return TrainDatasetMeta(train_set, eval_set)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Patch the model, which has its adapters."""
        if not cfg.get("flexmask"):
            return
        from flexmask.model import patch

        config = read_config(cfg)
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
        from flexmask.training.model import freeze_unreached
        from flexmask.training.stops import add_stops

        if not trainer.model_accepts_loss_kwargs:
            raise UnsupportedModelError(
                f"{type(trainer.model).__name__}: axolotl does not hand its loss the weights of a "
                "whole step, so that each batch would count the same; train it with flexmask train"
            )
        config = read_config(cfg)
        check_training_arguments(trainer.args, config)
        datasets = [data for data in (trainer.train_dataset, trainer.eval_dataset) if data]
        check_token_ids(trainer.model, trainer.processing_class, datasets)
        freeze_unreached(trainer.model, trainer.args)
        trainer.log_token_metrics = config.log_token_metrics
        trainer.batch_sampler = make_batch_sampler(
            config, trainer.args, trainer.train_dataset, trainer.model
        )
        add_stops(trainer.model, trainer.processing_class, trainer.train_dataset, trainer.args)

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
