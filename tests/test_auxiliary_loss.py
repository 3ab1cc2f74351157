"""The auxiliary loss of experts on a tree is that of a padded batch of all samples, by N-pass."""

import copy

import pytest
import torch
from model_cases import gradients, largest_error, padded, random_samples, supported, tiny_model

from flexmask import Sample, TreeCollator, build_tree, pack, patch
from flexmask.errors import DataError, UnsupportedModelError
from flexmask.model.families import AUXILIARY, FAMILIES
from flexmask.packing.rows import stack_rows
from flexmask.tools.verify.proof import Chat, verify_model

WITH_EXPERTS = [name for name in supported(FAMILIES) if AUXILIARY in FAMILIES[name]]
COEFFICIENT = 0.5


def with_loss(family):
    return tiny_model(family, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)


def conversations():
    """Samples with much in common, one of them a prefix, one there twice; and a second tree."""
    samples = random_samples(1)
    first = samples[0]
    prefix = Sample(first.input_ids[:-3], first.loss_weights[:-3], key="prefix")
    return [[*samples, prefix, prefix], random_samples(2)]


@pytest.fixture
def tree_batch():
    (row,) = pack([build_tree(random_samples(1))])
    return row.to_batch()


def auxiliary(model, **batch):
    """The loss by itself, and its gradients."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).aux_loss
    loss.backward()
    return [loss.detach()], float(loss.detach()), gradients(model)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_it_is_that_of_a_batch_of_all_samples(family):
    model = with_loss(family)
    trees = conversations()
    rows = [row for samples in trees for row in pack([build_tree(samples)])]
    batch = stack_rows(rows, pad_to_multiple_of=16)
    together = padded([sample for samples in trees for sample in samples])
    if not torch.is_tensor(model(**together).aux_loss):
        pytest.skip("this transformers computes none for the family")
    theirs = auxiliary(copy.deepcopy(model), **together)
    ours = auxiliary(patch(model), **batch)
    _, loss, grads = largest_error(ours, theirs)
    assert loss < 1e-6
    assert grads < 1e-5
    batch["sample_counts"] = torch.ones_like(batch["sample_counts"])
    assert largest_error(auxiliary(model, **batch), theirs)[1] > 1e-4


def test_it_is_a_part_of_the_loss(tree_batch):
    model = patch(with_loss("mixtral"))
    whole = model(**tree_batch)
    alone = model(**tree_batch, output_router_logits=False)
    assert alone.aux_loss is None
    expected = alone.loss + COEFFICIENT * whole.aux_loss
    torch.testing.assert_close(whole.loss, expected, rtol=1e-6, atol=0)


def test_padding_alone_has_none():
    model = patch(with_loss("mixtral"))
    output = model(**TreeCollator()([]), num_items_in_batch=9)
    assert output.aux_loss is None
    assert output.loss == 0
    output.loss.backward()
    assert not any(grad.any() for grad in gradients(model).values())
    asked = model(**TreeCollator()([]), num_items_in_batch=9, output_router_logits=True)
    assert asked.aux_loss.isfinite()


def test_compiled_padding_alone_is_a_number():
    model = torch.compile(patch(with_loss("mixtral")), backend="eager")
    assert model(**TreeCollator()([]), num_items_in_batch=9).loss.isfinite()


def test_lora_around_the_model_passes_the_counts_on(tree_batch):
    peft = pytest.importorskip("peft")
    model = with_loss("mixtral")
    expected = patch(copy.deepcopy(model))(**tree_batch).aux_loss
    adapters = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters)
    assert torch.equal(patch(model)(**tree_batch).aux_loss, expected)


def test_a_batch_without_counts_is_refused_with_the_remedy(tree_batch):
    model = patch(with_loss("mixtral"))
    counts = tree_batch.pop("sample_counts")
    with pytest.raises(DataError, match=r"needs sample_counts.*, or set output_router_logits=Fal"):
        model(**tree_batch)
    with pytest.raises(DataError, match=r"sample_counts must be \[1, \d+\] like subtree_end, got"):
        model(**tree_batch, sample_counts=counts[:, 1:])


def test_a_stack_that_is_called_by_itself_afterwards_takes_no_mask_of_ones_own(tree_batch):
    model = patch(with_loss("mixtral"))
    model(**tree_batch)
    inputs = {name: tree_batch[name] for name in ("input_ids", "position_ids", "subtree_end")}
    with pytest.raises(DataError, match="takes no attention_mask"):
        model.model(**inputs, attention_mask=torch.ones_like(tree_batch["input_ids"]))


def test_models_without_it_need_no_counts(tree_batch):
    model = patch(tiny_model("mixtral"))
    counted = model(**tree_batch).loss
    del tree_batch["sample_counts"]
    assert torch.equal(model(**tree_batch).loss, counted)


def test_a_verification_leaves_it_out_and_says_so():
    model = with_loss("mixtral")
    report = verify_model(model, [Chat(random_samples(1))])
    assert report.is_proved, str(report)
    assert "compared without it" in str(report)
    assert model.config.output_router_logits


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_that_keeps_no_gradient_of_it_is_refused(tree_batch, reentrant):
    model = patch(with_loss("mixtral")).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant:
        with pytest.raises(
            UnsupportedModelError, match="auxiliary loss of experts has no gradient"
        ):
            model(**tree_batch)
    else:
        assert model(**tree_batch).aux_loss.requires_grad
