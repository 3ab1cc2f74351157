"""Every verified family: one pass over a tree equals separate sequences; docs/models.md says so."""

import copy
import os
from pathlib import Path

import pytest
import torch
from model_cases import TINY, bounds, largest_error, npass_case, packed, single_pass, supported
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flexmask import FlexmaskError, patch
from flexmask.model.families import FAMILIES, REASONS, check_family
from flexmask.model.mixers import MIXERS

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


@pytest.mark.parametrize("family", supported(FAMILIES))
def test_packed_logits_and_gradients_equal_separate_sequences(family):
    model, samples, theirs = npass_case(family)
    ours = single_pass(patch(copy.deepcopy(model)), samples)
    logits, loss, grads = largest_error(ours, theirs)
    logits_bound, gradients_bound = bounds(family)
    assert logits < logits_bound
    assert loss < 1e-6
    assert grads < gradients_bound


@pytest.mark.parametrize("family", supported(FAMILIES))
def test_a_wrong_mask_fails_the_same_check_by_far(family):
    model, samples, theirs = npass_case(family)
    row, batch = packed(samples)
    batch["subtree_end"][:] = batch["subtree_end"].shape[1]  # plain causal
    output = patch(copy.deepcopy(model))(**batch)
    wrong = row.gather(output.logits[0])
    error = max((a - b).abs().max().item() for a, b in zip(wrong, theirs[0], strict=True))
    assert error > 100 * 1e-5


@pytest.mark.parametrize("family", supported(FAMILIES))
def test_loss_weights_reach_the_loss(family):
    model, samples, _ = npass_case(family)
    _, batch = packed(samples)
    trained = batch["shift_labels"] != -100
    weights = trained * torch.rand(trained.shape, generator=torch.Generator().manual_seed(0))
    output = patch(copy.deepcopy(model))(**batch, loss_weights=weights, num_items_in_batch=7)
    logprobs = output.logits.log_softmax(-1)
    chosen = logprobs.gather(-1, batch["shift_labels"].clamp_min(0)[..., None])[..., 0]
    expected = -(weights * chosen).sum() / 7
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", REASONS)
def test_families_that_are_not_exact_are_refused_with_the_reason(family):
    with pytest.raises(FlexmaskError, match="cannot be patched: ") as error:
        check_family(CONFIG_MAPPING[family]())
    assert REASONS[family] in str(error.value)


def test_a_family_that_nobody_verified_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["biogpt"](**TINY))
    with pytest.raises(FlexmaskError, match="'biogpt' cannot be patched: its family has not been"):
        patch(model)


def table():
    lines = [
        "# Models",
        "",
        "<!-- Written by `FLEXMASK_WRITE_DOCS=1 pytest -k docs_table`; a test compares it. -->",
        "",
        "A family is verified by a test: on a tiny random fp32 model, the packed logits of a tree",
        "equal those of every sample through the unpatched model to 1e-5, the loss to 1e-6 and the",
        "gradients of all parameters to 1e-5, and a wrong mask fails by more than a hundred times.",
        "What is not listed is refused by `patch`, by name. For layers that are recurrent or",
        "convolutional, the way is how they follow the tree ([hybrids.md](hybrids.md)); with",
        "transformers before 5.17 it is unrolled paths for all of them. They are held to 1e-10 in",
        "fp64 too; those with the delta rule in fp32 to 1e-5 or twice what N-pass itself errs there.",
        "",
        "| model_type | status | condition or reason | way | transformers |",
        "|---|---|---|---|---|",
    ]
    for name, note in FAMILIES.items():
        way = MIXERS[name].way if name in MIXERS else "-"
        lines += [f"| {name} | exact | {note or '-'} | {way} | {versions} |"]
    lines += [f"| {name} | refused | {reason} | - | - |" for name, reason in REASONS.items()]
    lines += [
        "",
        "Refused for every family, with the setting's name and value:",
        "",
        "- dropout or router jitter above 0, LoRA's included: N-pass would draw other noise;",
        "- a sliding window or attention chunks in any layer;",
        "- a head other than a language model's, and prompt learning, which puts tokens before the",
        "  row.",
        "",
        "Rotary embeddings of type `dynamic` and `longrope` change for a whole batch when its",
        "longest sample passes a limit: `max_position_embeddings`, for longrope",
        "`original_max_position_embeddings`. Up to it they are exact; a tree batch with a longer",
        "sample is refused when it is run.",
        "",
    ]
    return "\n".join(lines)


def test_the_docs_table_is_true():
    if os.environ.get("FLEXMASK_WRITE_DOCS"):
        DOCUMENT.write_text(table())
    assert DOCUMENT.read_text() == table()
