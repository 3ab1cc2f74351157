"""Losses over packed rows, held to their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import random_samples, sample_lists

from flexmask import FlexmaskError, PackedRow, Sample, build_tree, pack
from flexmask.model import logprobs
from flexmask.model.logprobs import score_tokens
from flexmask.model.loss import (
    TreeLoss,
    as_bits,
    target_logprobs,
    token_logprobs,
    token_logprobs_and_entropies,
    weighted_causal_loss,
)

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


def test_rejects_logits_of_other_positions_than_the_labels(logits):
    with pytest.raises(FlexmaskError, match=r"must be \[B, L\] = \[2, 1\] like .* got \[2, 4\]"):
        weighted_causal_loss(logits[:, -1:], LABELS)


def test_integer_weights_count_as_what_they_are(logits):
    def loss(weights):
        return TreeLoss(lambda *_: None)(logits, LABELS, loss_weights=weights, shift_labels=LABELS)

    weights = torch.tensor([[1, 0, 3, 2], [0, 2, 0, 0]])
    for kind in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(loss(weights.to(kind)), loss(weights.double()))


def test_bits_of_weights_give_the_loss_of_the_weights(logits):
    def loss(weights):
        return TreeLoss(lambda *_: None)(logits, LABELS, loss_weights=weights, shift_labels=LABELS)

    assert torch.equal(loss(as_bits(WEIGHTS / 3)), loss(WEIGHTS / 3))


def test_a_row_without_tokens_has_no_logprobs():
    logprobs, entropies = token_logprobs_and_entropies(torch.zeros(0, 5), PackedRow.empty())
    assert logprobs.shape == entropies.shape == (0,)


def test_a_loss_without_weights_is_the_models_own(logits):
    calls = []
    loss = TreeLoss(lambda *args, **kwargs: calls.append((args, kwargs)))
    loss(logits, LABELS, 5, shift_labels=LABELS, num_items_in_batch=3, subtree_end=LABELS)
    assert calls == [((logits, LABELS, 5), {"shift_labels": LABELS, "num_items_in_batch": 3})]


@pytest.mark.parametrize("given", [{"subtree_end": LABELS}, {"loss_weights": WEIGHTS}])
def test_rejects_labels_that_are_not_shifted(logits, given):
    with pytest.raises(FlexmaskError, match="shift_labels"):
        TreeLoss(lambda *_: None)(logits, LABELS, **given)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS_ON_CPU", 12)  # two positions of five tokens


def by_definition(logits, positions, tokens):
    """Log-probabilities and entropies as autograd has them."""
    logp = logits.log_softmax(-1)
    return logp[positions, tokens], -(logp.exp() * logp).sum(-1)


PREDICTIONS = (torch.tensor([0, 0, 3, 6, 5]), torch.tensor([1, 2, 4, 0, 3]))  # two after position 0


@pytest.mark.usefixtures("small_chunks")
def test_logprobs_entropies_and_their_gradients_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 5, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    results = score_tokens(ours, *PREDICTIONS, with_entropies=True)
    expected = by_definition(theirs, *PREDICTIONS)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=1e-14)
    for pair in (results, expected):
        (pair[0].square().sum() + pair[1].square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("wanted", [0, 1], ids=["logprobs", "entropies"])
def test_each_of_the_two_can_be_differentiated_alone(wanted):
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: score_tokens(z, *PREDICTIONS, with_entropies=True)[wanted], (logits,)
    )


def test_the_gradient_of_a_likely_token_is_rounded_once():
    logits = torch.tensor([[6.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    score_tokens(logits, torch.tensor([0]), torch.tensor([0]))[0].backward()
    exact = 1 - logits.detach().double().softmax(-1)[0, 0]  # 0.005: lost if 1 and p were rounded
    assert abs(logits.grad[0, 0] - exact) <= 2**-8 * exact


def test_a_token_that_cannot_come_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    _, entropies = score_tokens(logits, *torch.tensor([[0], [1]]), with_entropies=True)
    entropies.sum().backward()
    assert entropies.item() == pytest.approx(np.log(2))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_autograd_keeps_the_logits_and_a_few_numbers_a_position():
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    kept = 0

    def note(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() * (tensor.data_ptr() != logits.data_ptr())
        return tensor

    everywhere = torch.arange(64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        score_tokens(logits, everywhere, everywhere, with_entropies=True)
    assert kept <= 64 * 64  # where a table in fp32 has 64 * 4,000


def test_the_compiled_formula_equals_the_chunks(logits):
    compiled = torch.compile(target_logprobs, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, LABELS), target_logprobs(logits, LABELS))


def test_rejects_a_label_below_zero_that_is_not_the_one_to_ignore(logits):
    with pytest.raises(IndexError, match="out of bounds"):
        target_logprobs(logits, LABELS.clamp_min(-5))


def separately(samples, table):
    """Log-probabilities and entropies of each sample's tokens alone, by the definition.

    The model is a table: the logits after a token depend on all tokens up to it, by their sum.
    """
    results = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)
        logits = table[ids.cumsum(0) % len(table)][:-1]
        chosen, entropies = by_definition(logits, torch.arange(len(ids) - 1), ids[1:])
        zero = chosen.new_zeros(1)
        results.append((torch.cat((zero, chosen)), torch.cat((zero, entropies))))
    return results


@given(sample_lists(max_length=9))
def test_each_sample_gets_the_logprobs_of_its_own_tokens(samples):
    """Forks after trained and untrained tokens, duplicates, prefixes, and split rows."""
    table = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = table.clone().requires_grad_(), table.clone().requires_grad_()
    expected = {s.key: r for s, r in zip(samples, separately(samples, theirs), strict=True)}
    rows = pack([build_tree(samples)], max(map(len, samples)) + len(samples))
    total, number = 0.0, 0
    for row in rows:
        sums = np.empty(len(row), np.int64)
        for index in row.sample_indices:
            sums[index] = row.input_ids[index].cumsum()
        packed = token_logprobs_and_entropies(ours[torch.from_numpy(sums) % 11], row)
        only = token_logprobs(ours.detach()[torch.from_numpy(sums) % 11], row)
        assert torch.equal(packed[0], only)
        for key, *results in zip(row.keys, *map(row.gather, packed), strict=True):
            number += 1
            for result, value in zip(results, expected[key], strict=True):
                torch.testing.assert_close(result, value, rtol=0, atol=1e-14)
                total = total + (key + 1) * result.sin().sum()
    assert number == len(samples)
    other = sum((key + 1) * value.sin().sum() for key, pair in expected.items() for value in pair)
    if total.requires_grad:
        for loss in (total, other):
            loss.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_rejects_logits_of_another_row():
    (row,) = pack([build_tree(random_samples(0))])
    with pytest.raises(FlexmaskError, match=rf"L = {len(row)}, .* got \[1, {len(row)}, 50\]"):
        token_logprobs(torch.zeros(1, len(row), 50), row)
    with pytest.raises(FlexmaskError, match="token ids must be below V = 20, got 4"):
        token_logprobs(torch.zeros(len(row), 20), row)
