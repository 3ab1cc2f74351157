"""One pass equals N passes far below the rounding of fp32, and within that of bf16."""

import copy

import pytest
import torch
from fp64_llama import fp64_llama
from model_cases import gradients, npass, tiny_model
from strategies import random_samples

from flexmask import Sample, build_tree, pack, patch

BRANCHED = [  # forks inside trained tokens, two targets after one token, a shared target
    Sample([5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 1, 1]),
    Sample([5, 6, 7, 8, 11, 12], [0, 0, 1, 1, 1, 1]),
    Sample([5, 6, 7, 20], [0, 0, 1, 1]),
    Sample([5, 6], [0, 1]),
]


def single_pass(model, *conversations):
    """Loss and gradients of one packed row, divided by the targets of all samples."""
    model.zero_grad()
    (row,) = pack([build_tree(samples) for samples in conversations])
    count = sum(sample.num_trained for samples in conversations for sample in samples)
    output = model(**row.to_batch(), num_items_in_batch=count)
    output.loss.backward()
    return output.loss.item(), gradients(model)


@pytest.mark.parametrize(
    "conversations",
    [[random_samples(0)], [random_samples(1, num_samples=9)], [BRANCHED], [BRANCHED] * 2],
    ids=["turns", "many-turns", "branched", "forest"],
)
def test_fp64_loss_and_gradients_agree_to_ten_digits(conversations):
    model = fp64_llama()
    _, loss, expected = npass(model, [s for samples in conversations for s in samples])
    ours, ours_gradients = single_pass(patch(model, backend="reference"), *conversations)
    assert abs(ours - loss) <= 1e-10 * loss
    for name, gradient in expected.items():
        assert (ours_gradients[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_bf16_errs_no_more_than_bf16_npass_does():
    samples = random_samples(2)
    model = tiny_model("llama")
    _, loss, expected = npass(model, samples)
    low = copy.deepcopy(model).bfloat16()
    _, low_loss, low_gradients = npass(low, samples)
    ours, ours_gradients = single_pass(patch(low), samples)
    assert abs(ours - loss) <= 2 * abs(low_loss - loss) + 2**-8 * loss
    for name, gradient in expected.items():
        budget = 2 * (low_gradients[name] - gradient).norm() + 2**-8 * gradient.norm()
        assert (ours_gradients[name] - gradient).norm() <= budget, name


def test_fp64_stays_fp64():
    model = patch(fp64_llama(), backend="reference")
    (row,) = pack([build_tree(BRANCHED)])
    output = model(**row.to_batch(), num_items_in_batch=1)
    assert output.logits.dtype == output.loss.dtype == torch.float64
