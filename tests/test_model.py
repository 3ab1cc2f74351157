"""The drop-in: what a patched model does with tree batches, with others, and with bad ones."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from model_cases import (
    MIXER_KINDS,
    gradients,
    largest_error,
    mixers,
    npass,
    npass_case,
    packed,
    single_pass,
    supported,
    tiny_model,
)
from strategies import random_samples, sample_lists

from flexmask import FlexmaskError, Sample, disabled, patch, unpatch
from flexmask.packing.rows import stack_rows

IDS = torch.arange(12).view(2, 6) % 50
KINDS = ["llama", *supported(MIXER_KINDS)]  # one family for each kind of layer


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def samples():
    return random_samples(2)


@settings(max_examples=20)
@given(sample_lists(vocabulary=5))
def test_any_tree_equals_separate_sequences(samples):
    samples = [*samples, Sample([1, 2], [0, 1])]
    model = tiny_model("qwen3", vocab_size=5)
    theirs = npass_weighted(model, samples)
    logits, loss, grads = largest_error(single_pass(patch(model), samples), theirs)
    assert logits < 1e-5
    assert loss < 1e-6
    assert grads < 1e-5


def npass_weighted(model, samples):
    """N-pass with loss weights, which stock models do not know: by hand."""
    from flexmask.model.loss import weighted_causal_loss
    from flexmask.model.npass import npass_batches

    model.zero_grad()
    total = sum(float(sample.loss_weights[1:].sum()) for sample in samples)
    logits, loss = [], 0.0
    for batch in npass_batches(samples):
        output = model(batch["input_ids"])
        part = weighted_causal_loss(
            output.logits, batch["shift_labels"], batch.get("loss_weights"), total
        )
        part.backward()
        logits.append(output.logits[0].detach())
        loss += part.item()
    return logits, loss, gradients(model)


def test_num_items_in_batch_is_the_divisor(model, samples):
    _, batch = packed(samples)
    patch(model)
    mean = model(**batch).loss
    count = (batch["shift_labels"] != -100).sum()
    halved = model(**batch, num_items_in_batch=2 * count).loss
    assert halved.item() == pytest.approx(mean.item() / 2)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "eager"), ("llama4_text", None), *((family, None) for family in KINDS)],
)
def test_ordinary_batches_run_as_before(family, implementation):
    model = copy.deepcopy(npass_case(family)[0]).eval()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    implementation = model.config._attn_implementation
    padding = torch.ones_like(IDS)
    padding[0, :2] = 0
    before = [model(IDS).logits, model(IDS, attention_mask=padding).logits]
    text = model.generate(IDS, max_new_tokens=5, do_sample=False)
    patch(model)
    for _ in range(2):
        for expected, batch in zip(before, ({}, {"attention_mask": padding}), strict=True):
            assert torch.equal(model(IDS, **batch).logits, expected)
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), text)
        with disabled(model):
            assert torch.equal(model(IDS).logits, before[0])
        unpatch(model)
    assert model.config._attn_implementation == implementation
    assert not any({"_flexmask", "forward"} & vars(module).keys() for module in model.modules())


@pytest.mark.parametrize("family", KINDS)
def test_inputs_embeds_take_the_place_of_input_ids(family):
    model, samples, _ = npass_case(family)
    _, batch = packed(samples)
    model = patch(copy.deepcopy(model))
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **batch).logits, expected)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_survives_other_forwards_before_the_backward(family, reentrant):
    model = patch(copy.deepcopy(npass_case(family)[0]))
    samples = npass_case(family)[1]
    expected = single_pass(model, samples)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.zero_grad()
    row, batch = packed(samples)
    output = model(**batch)
    model(IDS)
    model(**packed(random_samples(3))[1])
    output.loss.backward()
    ours = (row.gather(output.logits[0].detach()), output.loss.item(), gradients(model))
    assert max(largest_error(ours, expected)) < 1e-6


@pytest.mark.parametrize("family", KINDS)
def test_autocast_runs_in_its_own_type(family):
    # Of minimax, all experts: rounding changes which are chosen, in N-pass as much.
    model = tiny_model(family, **({"num_experts_per_tok": 4} if family == "minimax" else {}))
    _, batch = packed(random_samples(1))
    model = patch(model)
    expected = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    assert (output.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_patched_model_is_patched_by_itself(family, twin_of):
    model, samples, theirs = npass_case(family)
    model = patch(copy.deepcopy(model))
    twin = twin_of(model)
    assert not any(state.mixer in set(model.modules()) for state in mixers(twin))
    unpatch(model)
    assert largest_error(single_pass(twin, samples), theirs)[0] < 1e-5
    assert not any("_flexmask" in vars(module) for module in unpatch(twin).modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_trees_run_over_any_previous_implementation(model, samples, implementation):
    theirs = npass(model, samples)
    model.set_attn_implementation(implementation)
    logits, _, grads = largest_error(single_pass(patch(model), samples), theirs)
    assert max(logits, grads) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(family, samples, backend, reentrant):
    model = tiny_model(family)
    theirs = npass(model, samples)
    patch(model, backend=backend)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert max(largest_error(single_pass(model, samples), theirs)) < 1e-5


def test_lora_equals_npass(model, samples):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(
        model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    )
    theirs = npass(lora, samples)
    assert max(largest_error(single_pass(patch(lora), samples), theirs)) < 1e-5
    with pytest.raises(FlexmaskError, match="needs position_ids"):
        lora(IDS, subtree_end=IDS)


def test_a_patched_model_can_be_wrapped_by_peft(model, samples):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(patch(model), LoraConfig(r=2, init_lora_weights=False))
    ours = single_pass(lora, samples)
    with disabled(lora):
        theirs = npass(lora, samples)
    assert max(largest_error(ours, theirs)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_compiled_model_equals_the_eager_one(family, samples):
    model = tiny_model(family)
    _, batch = packed(samples)
    patch(model)
    expected = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**batch)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    output.loss.backward()


def test_a_saved_model_knows_nothing_of_the_patch(model, tmp_path):
    patch(model).save_pretrained(tmp_path)
    assert "flexmask" not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_patching_twice_takes_the_second_backend(model, samples):
    patch(patch(model, backend="reference"), backend="cpu")
    single_pass(model, samples)
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any("_flexmask" in vars(module) for module in model.modules())


def test_disabled_takes_ordinary_batches_only(model, samples):
    _, batch = packed(samples)
    before = model(IDS).logits
    expected = patch(model)(**batch).logits
    with disabled(model), disabled(model):
        assert torch.equal(model(IDS).logits, before)
    with disabled(model), pytest.raises(FlexmaskError, match="flexmask is disabled"):
        model(**batch)
    assert torch.equal(model(**batch).logits, expected)


def test_a_backward_may_come_while_disabled(model, samples):
    theirs = npass(model, samples)
    patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    output = model(**packed(samples)[1])
    with disabled(model):
        output.loss.backward()
    assert max(largest_error((theirs[0], output.loss.item(), gradients(model)), theirs)) < 1e-5


def test_a_model_that_is_not_patched_can_be_disabled_and_unpatched(model):
    with disabled(model):
        unpatch(model)


def test_another_model_with_the_same_configuration_stays_as_it_was(model):
    twin = type(model)(model.config)
    before = twin(IDS).logits
    patch(model)
    assert torch.equal(twin(IDS).logits, before)


def test_ordinary_batches_follow_the_implementation_that_is_set(model, samples):
    expected = patch(model)(**packed(samples)[1]).logits
    model.set_attn_implementation("eager")
    output = model(IDS, output_attentions=True)
    assert output.attentions[0].shape == (2, 4, 6, 6)
    assert torch.equal(model(**packed(samples)[1]).logits, expected)


def test_ordinary_training_is_unchanged_by_a_patch(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, grads = [], []
    for _ in range(2):
        model.zero_grad()
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        grads.append(gradients(model))
        patch(model)
    assert torch.equal(*losses)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_loss_weights_count_in_ordinary_batches_too(model):
    labels = IDS.roll(-1, 1)
    whole = patch(model)(IDS, labels=IDS, shift_labels=labels).loss
    weights = torch.full(IDS.shape, 0.5)
    half = model(
        IDS, labels=IDS, shift_labels=labels, loss_weights=weights, num_items_in_batch=12
    ).loss
    assert half.item() == pytest.approx(whole.item() / 2)


def test_a_decoder_stack_alone_can_be_patched(model, samples):
    _, batch = packed(samples)
    expected = patch(model)(**batch, output_hidden_states=True).hidden_states[-1]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "subtree_end")}
    assert torch.equal(model.model(**inputs).last_hidden_state, expected)
    alone = patch(unpatch(model).model)
    assert torch.equal(alone(**inputs).last_hidden_state, expected)


def test_rows_of_a_batch_do_not_see_each_other(model):
    conversations = [random_samples(seed, num_samples=seed + 1) for seed in range(3)]
    rows = [packed(samples)[0] for samples in conversations]
    batch = stack_rows(rows, pad_to_multiple_of=8)
    patch(model)
    logits = model(**batch).logits
    for index, row in enumerate(rows):
        alone = model(**row.to_batch()).logits[0]
        torch.testing.assert_close(logits[index, : len(row)], alone, rtol=1e-5, atol=1e-5)


def test_a_loss_function_of_ones_own_is_kept(model):
    model.loss_function = own = lambda logits, labels, **_: logits.sum()
    unpatch(patch(model))
    assert model.loss_function is own
