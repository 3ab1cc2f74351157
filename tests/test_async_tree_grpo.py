"""TRL's asynchronous GRPO on flexmask: its rows as trees, its steps as on separate sequences."""

from importlib.metadata import version
from itertools import pairwise
from unittest import mock

import async_tree_grpo
import numpy as np
import pytest
import torch
from async_tree_grpo import FIELDS, TreeAsyncGRPOTrainer, heavy_first, read_fields, write_fields
from backend_cases import mask_from_depths
from comparison import changed_copy, score_separately
from datasets import Dataset
from hypothesis import given
from model_cases import tiny_model
from sample_cases import random_samples
from strategies import forests, sample_lists
from trainer_cases import LEARNING_RATE, NUM_STEPS, arguments, assert_same_weights, parameters
from trl.experimental.async_grpo import AsyncGRPOConfig
from trl.experimental.async_grpo.packing import TreeRow

from flexmask import FlexmaskError, compile_mask

pytestmark = pytest.mark.skipif(
    not version("trl").startswith("1.16."), reason="takes TRL 1.16 by its inner parts"
)
VOCABULARY = 1792  # of the shipped tokenizer


def tree_row(samples):
    """TRL's row of these samples."""
    row = TreeRow()
    for sample in samples:
        row.add(
            {
                "input_ids": torch.from_numpy(sample.input_ids),
                "completion_mask": torch.from_numpy(sample.loss_weights > 0).int(),
                "old_log_probs": torch.zeros(len(sample)),
                "advantage": 1.0,
                "group_id": 0,
            }
        )
    return row


def arrays(packed):
    return tuple(packed[name].numpy() for name in FIELDS)


def seen(cu_q, cu_k, kv_index):
    """Bool [L, L]: what TRL's attention shows each token, causal from the end of each path."""
    dense = np.zeros((cu_q[-1], cu_q[-1]), bool)
    for segment, (start, stop) in enumerate(pairwise(cu_q)):
        path = kv_index[cu_k[segment] : cu_k[segment + 1]]
        for token in range(start, stop):
            dense[token, path[: path.size - (stop - 1 - token)]] = True
    return dense


@given(sample_lists())
def test_rows_of_trl_are_read_as_the_trees_that_they_hold(samples):
    row = tree_row(samples)
    for packed in (row.pack(), heavy_first(row).pack()):
        end = read_fields(*arrays(packed))
        by_ancestry = mask_from_depths(packed["position_ids"].tolist())
        assert (end == by_ancestry.subtree_end[0].numpy()).all()
        assert (by_ancestry.to_dense()[0].numpy() == seen(*arrays(packed))).all()
        for given_field, written in zip(arrays(packed), write_fields(end), strict=True):
            assert given_field.dtype == written.dtype
            assert (given_field == written).all()


@given(forests())
def test_rows_of_flexmask_are_written_as_trl_reads_them(trees):
    mask = compile_mask(trees)
    fields = write_fields(mask.subtree_end[0].numpy())
    assert (seen(*fields) == mask.to_dense()[0].numpy()).all()


@given(sample_lists())
def test_heavy_first_has_the_largest_subtree_first_at_every_fork(samples):
    end = read_fields(*arrays(heavy_first(tree_row(samples)).pack()))
    for token, stop in enumerate(end.tolist()):
        sizes, child = [], token + 1
        while child < stop:
            sizes.append(end[child] - child)
            child = end[child]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param([[0], [0, 1], [0, 2], [0, 1, 3]], id="breadth-first"),
        pytest.param([[0], [0, 1], [1, 2], [0, 3]], id="another-branch"),
        pytest.param([[0], [1, 0], [0, 2], [0, 3]], id="backwards"),
    ],
)
def test_other_orders_are_refused(paths):
    cu_k = np.cumsum([0, *map(len, paths)], dtype=np.int32)
    with pytest.raises(FlexmaskError, match=r"^tree_.* depth-first preorder"):
        read_fields(np.arange(5, dtype=np.int32), cu_k, np.concatenate(paths))


def async_case(family):
    """Rollouts in two groups of four, and what their loss takes beside the policy's figures."""
    model = tiny_model(family, vocab_size=VOCABULARY)
    samples = random_samples(0, num_samples=4) + random_samples(1, num_samples=4)
    torch.manual_seed(0)
    with torch.no_grad():
        old, _ = score_separately(changed_copy(model, 0.02), samples)
    return model, samples, old, torch.linspace(-1.5, 2, len(samples))


def by_hand(model, samples, old, advantages):
    """Parameters before and after three steps on separate sequences."""
    before = parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(NUM_STEPS):
        new, _ = score_separately(model, samples)
        losses = []
        for ours, theirs, sample, advantage in zip(new, old, samples, advantages, strict=True):
            ratio = (ours - theirs).exp()[sample.loss_weights > 0]
            losses.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        torch.cat(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, parameters(model)


def asynchronous(folder, tokenizer, worker, backend="auto", **settings):
    """A trainer of three steps from the rollouts of a worker, without a server."""
    with mock.patch.object(async_tree_grpo.async_grpo_trainer, "VLLMClient"):
        return TreeAsyncGRPOTrainer(
            model=str(folder),
            backend=backend,
            args=arguments(
                folder,
                AsyncGRPOConfig,
                **{
                    "bf16": False,
                    "max_steps": NUM_STEPS,
                    "max_staleness": 2 * NUM_STEPS,
                    "per_device_train_batch_size": 8,
                    "token_budget": 0,
                    "router_aux_loss_coef": 0.0,
                }
                | settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["..."]}),
            processing_class=tokenizer,
            rollout_worker=worker,
            weight_transfer=mock.Mock(),
        )


@pytest.mark.parametrize(
    ("family", "backend"),
    [("llama", "cpu"), ("llama", "reference"), ("gpt_oss", "cpu"), ("qwen3_moe", "auto")],
)
def test_three_asynchronous_steps_equal_separate_sequences(tmp_path, tokenizer, family, backend):
    model, *case = async_case(family)
    model.save_pretrained(tmp_path)
    trainer = asynchronous(tmp_path, tokenizer, async_tree_grpo.recorded(*case), backend)
    trainer.train()
    assert_same_weights(parameters(trainer.model), *by_hand(model, *case))


def test_a_row_without_the_fields_is_refused():
    with pytest.raises(FlexmaskError, match=r"have tree_cu_seqlens_q, this one has not"):
        async_tree_grpo.take_fields(torch.nn.Identity(), (), {"input_ids": torch.zeros(1, 1)})


def test_the_auxiliary_loss_of_experts_is_refused_in_rows_of_trl(tmp_path, tokenizer):
    tiny_model("qwen3_moe", vocab_size=VOCABULARY).save_pretrained(tmp_path)
    with pytest.raises(FlexmaskError, match=r"router_aux_loss_coef must be 0, got 0\.1"):
        asynchronous(tmp_path, tokenizer, mock.Mock(), router_aux_loss_coef=0.1)
