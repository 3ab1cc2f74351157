"""Every verified family: one pass over a tree equals separate sequences; docs/models.md says so."""

from pathlib import Path

import pytest
import torch
from model_cases import copy_of, largest_error, npass, packed, single_pass, tiny_model
from strategies import random_samples
from transformers import CONFIG_MAPPING

from flexmask import FlexmaskError, patch
from flexmask.model.families import FAMILIES, REASONS

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_equal_separate_sequences(family):
    model = tiny_model(family)
    samples = random_samples(1)
    theirs = npass(model, samples)
    logits, loss, grads = largest_error(single_pass(patch(copy_of(model)), samples), theirs)
    assert logits < 1e-5
    assert loss < 1e-6
    assert grads < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_mask_fails_the_same_check_by_far(family):
    model = tiny_model(family)
    samples = random_samples(1)
    theirs = npass(model, samples)
    patch(model)
    row, batch = packed(samples)
    batch["subtree_end"][:] = batch["subtree_end"].shape[1]  # plain causal
    wrong = row.gather(model(**batch).logits[0])
    error = max((a - b).abs().max().item() for a, b in zip(wrong, theirs[0], strict=True))
    assert error > 100 * 1e-5


@pytest.mark.parametrize("family", [name for name in REASONS if name in CONFIG_MAPPING])
def test_families_that_are_not_exact_are_refused_with_the_reason(family):
    class Model(torch.nn.Module):
        pass

    from flexmask.model.families import check_family

    model = Model()
    model.config = CONFIG_MAPPING[family]()
    with pytest.raises(FlexmaskError, match="cannot be patched: it has"):
        check_family(model)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ("mistral", {"sliding_window": 8}, "sliding_window must be None, got 8|full attention"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "full attention, got sliding_attention",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embedding of type 'dynamic'",
        ),
    ],
)
def test_settings_that_are_not_exact_are_refused_with_the_reason(family, settings, message):
    with pytest.raises(FlexmaskError, match=message):
        patch(tiny_model(family, **settings))


def table():
    lines = [
        "# Models",
        "",
        "<!-- Written by `python tests/test_model_families.py`; a test compares it. -->",
        "",
        "A family is verified by a test: on a tiny random fp32 model, the packed logits of a tree equal",
        "those of every sample through the unpatched model to 1e-5, the loss to 1e-6 and the gradients of",
        "all parameters to 1e-5, while a wrong mask fails by more than a hundred times. What is not",
        "listed is refused by `patch`, by name.",
        "",
        "| model_type | status | condition |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | verified | {note or 'none'} |" for name, note in FAMILIES.items()]
    lines += [f"| {name} | refused | {reason} |" for name, reason in REASONS.items()]
    lines += [
        "",
        "Refused for every family: attention dropout or any other dropout above 0, since N-pass would",
        "draw other masks; rotary embeddings of type `dynamic` and `longrope`, which depend on the",
        "longest sequence of a batch; sliding windows and chunks.",
        "",
    ]
    return "\n".join(lines)


def test_the_docs_table_is_true():
    assert DOCUMENT.read_text() == table()


if __name__ == "__main__":
    DOCUMENT.write_text(table())
