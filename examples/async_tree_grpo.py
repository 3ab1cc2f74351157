"""TRL's asynchronous GRPO on any attention backend: with sinks, without FlashAttention 3.

    python examples/async_tree_grpo.py

`trl.experimental.async_grpo` folds rollouts into trees by itself (`TreeRow`). Its attention, which
needs FlashAttention 3, is told for each of S contiguous segments which tokens its last one sees,
the path from the root, K tokens for all segments together:

    tree_cu_seqlens_q [S + 1]     where segments begin in the row
    tree_cu_seqlens_k [S + 1]     where their paths begin in
    tree_kv_index [K]             the paths, end to end, as positions in the row

Token k is on the paths of its subtree, whose segments lie side by side in preorder. So its
`subtree_end` is where the last segment ends that has it on its path. docs/beyond-chat.md has more.
"""

import queue
import tempfile
from itertools import cycle
from typing import Any
from unittest import mock

import numpy as np
import torch
from comparison import score_separately, small_model
from datasets import Dataset
from grpo_step import GROUP_SIZE, advantages_of, sample_group
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.async_grpo.packing import TreeRow
from trl.trainer.utils import create_model_from_path

from flexmask import FlexmaskError, Sample, patch, read_conversations
from flexmask.demo import DATA_PATH, TOKENIZER_PATH

FIELDS = ("tree_cu_seqlens_q", "tree_cu_seqlens_k", "tree_kv_index")


def read_fields(cu_q: np.ndarray, cu_k: np.ndarray, kv_index: np.ndarray) -> np.ndarray:
    """The `subtree_end`, int32 [L], that the three fields say.

    Raises:
        FlexmaskError: the row is no forest in depth-first preorder.
    """
    end = np.zeros(cu_q[-1], np.int32)
    np.maximum.at(end, kv_index, np.repeat(cu_q[1:], np.diff(cu_k)).astype(np.int32))
    again = write_fields(end, cu_q)
    for name, given, expected in zip(FIELDS, (cu_q, cu_k, kv_index), again, strict=True):
        if not np.array_equal(given, expected):
            raise FlexmaskError(
                f"{name}: segments must see their ancestors and themselves, and lie in depth-first "
                "preorder, as TreeRow.pack of TRL 1.16 has them; other orders have no subtree_end"
            )
    return end


def write_fields(end: np.ndarray, cu_q: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """The fields of a row with `subtree_end` [L], in the order of FIELDS.

    Args:
        end: int [L].
        cu_q: where segments begin, and L; None for as few segments as there can be.
    """
    if cu_q is None:  # the tokens of a segment have one subtree end
        cu_q = np.append(np.flatnonzero(np.diff(end, prepend=-1)), end.size).astype(np.int32)
    paths = [
        np.append(np.flatnonzero(end[:start] > start), np.arange(start, stop))
        for start, stop in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
    ]
    cu_k = np.cumsum([0, *map(len, paths)], dtype=np.int32)
    return cu_q, cu_k, np.concatenate(paths)


def take_fields(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a patched model runs: `subtree_end` in the place of TRL's fields."""
    missing = [name for name in FIELDS if name not in kwargs]
    if missing:
        raise FlexmaskError(f"rows of TRL 1.16 have {missing[0]}, this one has not; take TRL 1.16")
    end = read_fields(*(kwargs.pop(name).cpu().numpy() for name in FIELDS))
    for name in ("tree_max_seqlen_q", "tree_max_seqlen_k"):
        del kwargs[name]
    kwargs["subtree_end"] = torch.from_numpy(end)[None].to(kwargs["input_ids"].device)
    kwargs["labels"] = kwargs["shift_labels"]
    return args, kwargs


def heavy_first(row: TreeRow) -> TreeRow:
    """The row with the largest subtree first wherever it forks, so that tiles are denser."""
    sizes = [1] * len(row.tokens)
    for node in reversed(range(len(sizes))):  # TRL lists children after their parents
        sizes[node] += sum(sizes[child] for child in row.children[node].values())
    for children in row.children:
        ordered = sorted(children.items(), key=lambda item: -sizes[item[1]])
        children.clear()
        children.update(ordered)
    return row


class TreeAsyncGRPOTrainer(AsyncGRPOTrainer):
    """AsyncGRPOTrainer on flexmask's attention; loss and gradients are those of its own rows."""

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        """Takes what AsyncGRPOTrainer takes.

        Args:
            args: of AsyncGRPOTrainer.
            backend: of the attention, as in `patch`.
            kwargs: of AsyncGRPOTrainer.

        Raises:
            FlexmaskError: a model or setting that would not be exact.
        """
        replaced = {"create_model_from_path": _load, "get_peak_flops_per_device": lambda *_: None}
        with mock.patch.multiple(async_grpo_trainer, **replaced):
            super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise FlexmaskError(
                f"router_aux_loss_coef must be 0, got {self.router_aux_loss_coef}: rows of TRL do "
                "not say how many rollouts hold a token, by which that loss counts it"
            )
        model = patch(self.accelerator.unwrap_model(self.model), backend=backend)
        model.register_forward_pre_hook(take_fields, with_kwargs=True, prepend=True)

    def get_train_dataloader(self) -> Any:
        """The loader of TRL, with rows laid out heavy first."""
        loader = super().get_train_dataloader()
        collate = loader.collate_fn
        loader.base_dataloader.collate_fn = lambda batches: collate(
            [[heavy_first(row) for row in rows] for rows in batches]
        )
        return loader

    def _log_step_metrics(self) -> None:
        """The figures of TRL without its FLOPs, which it counts for few models and no CPU."""
        with mock.patch.object(async_grpo_trainer, "compute_flops_per_token"):
            super()._log_step_metrics()


def _load(*args: Any, attn_implementation: str, **kwargs: Any) -> PreTrainedModel:
    """The model with its own attention; TRL, which looks for sinks at once, finds none."""
    model = create_model_from_path(*args, **kwargs)

    def without_sinks() -> list[tuple[str, nn.Parameter]]:
        del model.named_parameters  # once
        return [item for item in model.named_parameters() if not item[0].endswith(".sinks")]

    model.named_parameters = without_sinks
    return model


def recorded(samples: list[Sample], old: list[torch.Tensor], advantages: torch.Tensor) -> mock.Mock:
    """A rollout worker that hands out these rollouts, in groups of GROUP_SIZE, over and over."""
    rollouts = cycle(
        RolloutSample(
            prompt=[],
            completion=[],
            input_ids=torch.from_numpy(sample.input_ids),
            completion_mask=torch.from_numpy(sample.loss_weights).int(),
            old_log_probs=logprobs,
            advantage=advantage.item(),
            model_version=0,
            group_id=index // GROUP_SIZE,
            metrics={},
        )
        for index, (sample, logprobs, advantage) in enumerate(
            zip(samples, old, advantages.flatten(), strict=True)
        )
    )
    buffer = mock.Mock(get=lambda timeout: next(rollouts), qsize=lambda: 0)
    return mock.Mock(rollout_buffer=buffer, metrics_queue=queue.Queue())


def main() -> None:
    """A step from three groups of rollouts, without a server."""
    model = small_model()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    samples = []
    for chat in list(read_conversations(DATA_PATH))[:3]:
        prompt = tokenizer.apply_chat_template(
            chat.messages[:2], add_generation_prompt=True, return_dict=False
        )
        samples += sample_group(model, prompt)
    with torch.no_grad():
        old, _ = score_separately(model, samples)
    rewards = torch.tensor([float(len(set(sample.input_ids))) for sample in samples])
    no_server = mock.patch.object(async_grpo_trainer, "VLLMClient")
    with tempfile.TemporaryDirectory() as folder, no_server:
        model.save_pretrained(folder)
        trainer = TreeAsyncGRPOTrainer(
            model=folder,
            args=AsyncGRPOConfig(
                folder,
                per_device_train_batch_size=len(samples),
                token_budget=0,  # batches of so many rollouts, not of so many tokens
                max_steps=1,
                bf16=False,
                logging_steps=1,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"prompt": ["..."]}),
            processing_class=tokenizer,
            rollout_worker=recorded(samples, old, advantages_of(rewards.view(-1, GROUP_SIZE))),
            weight_transfer=mock.Mock(),  # to a server for generation
        )
        trainer.train()
    log = trainer.state.log_history[0]
    print(
        f"loss {log['loss']:.6f}, kl {log['kl']:.6f}, entropy {log['entropy']:.4f}, "
        f"{log['batch/packing_ratio']:.2f} times fewer tokens"
    )


if __name__ == "__main__":
    main()
