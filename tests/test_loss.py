"""Losses over packed rows, held to their definitions."""

import pytest
import torch

from flexmask import FlexmaskError, Sample, build_tree, pack
from flexmask.loss import TreeLoss, target_logprobs, weighted_causal_loss

LABELS = torch.tensor([[3, -100, 0, 1], [2, 2, -100, -100]])
WEIGHTS = torch.tensor([[0.5, 9.0, 2.0, 1.0], [0.0, 1.5, 0.0, 7.0]])


@pytest.fixture
def logits():
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(logits, row, position):
    return logits[row, position].log_softmax(-1)[LABELS[row, position]]


def test_logprobs_are_those_of_the_targets_and_zero_elsewhere(logits):
    logprobs = target_logprobs(logits, LABELS)
    for row in range(2):
        for position in range(4):
            trained = LABELS[row, position] != -100
            expected = by_hand(logits, row, position) if trained else torch.tensor(0.0)
            assert logprobs[row, position].item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_low_precision_is_computed_in_fp32(logits, given, computed):
    assert target_logprobs(logits.to(given), LABELS).dtype == computed
    assert weighted_causal_loss(logits.to(given), LABELS, WEIGHTS).dtype == computed


def test_logprobs_come_back_sample_by_sample():
    samples = [Sample([0, 1, 2, 3], [0, 1, 1, 1]), Sample([0, 1, 4], [0, 1, 1])]
    (row,) = pack([build_tree(samples)])
    batch = row.to_batch()
    logits = torch.randn(1, len(row), 5, generator=torch.Generator().manual_seed(1))
    logprobs = target_logprobs(logits, batch["shift_labels"])[0]
    gathered = row.gather(logprobs)
    assert [len(values) for values in gathered] == [4, 3]
    assert torch.equal(gathered[0][0], gathered[1][0])  # both predict token 1 after token 0


def test_the_loss_is_the_weighted_sum_over_the_number_of_items(logits):
    terms = [(0, 0, 0.5), (0, 2, 2.0), (0, 3, 1.0), (1, 1, 1.5)]
    total = -sum(weight * by_hand(logits, row, position) for row, position, weight in terms)
    assert weighted_causal_loss(logits, LABELS, WEIGHTS, 8).item() == pytest.approx(
        total.item() / 8
    )
    divisor = torch.tensor(8)
    assert weighted_causal_loss(logits, LABELS, WEIGHTS, divisor) == pytest.approx(total.item() / 8)
    assert weighted_causal_loss(logits, LABELS, WEIGHTS).item() == pytest.approx(total.item() / 5)


def test_without_weights_each_target_counts_once(logits):
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    assert weighted_causal_loss(logits, LABELS).item() == pytest.approx(expected.item())


def test_positions_without_a_target_get_no_gradient(logits):
    logits.requires_grad_()
    weighted_causal_loss(logits, LABELS, WEIGHTS).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, (LABELS != -100) & (WEIGHTS > 0))


def test_rejects_weights_of_another_shape(logits):
    with pytest.raises(FlexmaskError, match=r"shape of shift_labels, \[2, 4\], got \[2, 3\]"):
        weighted_causal_loss(logits, LABELS, WEIGHTS[:, :3])


def test_a_loss_without_weights_is_the_models_own(logits):
    calls = []
    loss = TreeLoss(lambda *args, **kwargs: calls.append((args, kwargs)))
    loss(logits, LABELS, 5, shift_labels=LABELS, num_items_in_batch=3, subtree_end=LABELS)
    assert calls == [((logits, LABELS, 5), {"shift_labels": LABELS, "num_items_in_batch": 3})]


@pytest.mark.parametrize("given", [{"subtree_end": LABELS}, {"loss_weights": WEIGHTS}])
def test_rejects_labels_that_are_not_shifted(logits, given):
    with pytest.raises(FlexmaskError, match="shift_labels"):
        TreeLoss(lambda *_: None)(logits, LABELS, **given)
