"""Every verified family: one pass over a tree equals separate sequences; docs/models.md says so."""

import copy
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from model_cases import TINY, bounds, largest_error, npass_case, packed, single_pass, supported
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flexmask import FlexmaskError, patch
from flexmask.backends.api import dispatch
from flexmask.model import families, tree_attention
from flexmask.model.adapter import wrong_masks
from flexmask.model.families import FAMILIES, REASONS, SINCE, VERSIONS, check_family
from flexmask.model.mixers.kinds import MIXERS
from flexmask.model.windows import BY_LAYER_TYPE, ONE_WINDOW

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
PRESENT = supported(FAMILIES)
BOUNDED = [name for name in PRESENT if name in (*ONE_WINDOW, *BY_LAYER_TYPE)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", PRESENT)
def test_packed_logits_and_gradients_equal_separate_sequences(family, backend):
    model, samples, theirs = npass_case(family)
    ours = single_pass(patch(copy.deepcopy(model), backend=backend), samples)
    logits, loss, grads = largest_error(ours, theirs)
    logits_bound, gradients_bound = bounds(family)
    assert logits < logits_bound
    assert loss < 1e-6
    assert grads < gradients_bound


@pytest.mark.parametrize("family", PRESENT)
def test_a_wrong_mask_fails_the_same_check_by_far(family):
    model, _, _ = npass_case(family)
    assert error_with(patch(copy.deepcopy(model)), family, is_causal=True) > 100 * 1e-5


@pytest.mark.parametrize("family", BOUNDED)
def test_the_right_mask_without_its_window_fails_the_same_check_by_far(family, monkeypatch):
    def unbounded(*tensors, window, chunk, **options):
        found.append(window or chunk)
        return dispatch(*tensors, **options)

    found = []
    monkeypatch.setattr(tree_attention, "dispatch", unbounded)
    assert error_with(patch(copy.deepcopy(npass_case(family)[0])), family) > 100 * 1e-5
    assert any(found)


def error_with(model, family, *, is_causal=False):
    """The largest error of the logits of a patched model, whose mask may be plain causal."""
    _, samples, theirs = npass_case(family)
    row, batch = packed(samples)
    if is_causal:
        batch["subtree_end"][:] = batch["subtree_end"].shape[1]
    with torch.no_grad(), wrong_masks(model) if is_causal else nullcontext():
        logits = row.gather(model(**batch).logits[0])
    return max((a - b).abs().max().item() for a, b in zip(logits, theirs[0], strict=True))


@pytest.mark.parametrize("family", PRESENT)
def test_embeddings_that_belong_to_no_token_take_the_place_of_tokens(family):
    model, samples, _ = npass_case(family)
    model = copy.deepcopy(model)
    soft = torch.randn(50, model.get_input_embeddings().embedding_dim)

    def logits(batch):
        embeds = soft[batch.pop("input_ids")]
        return model(inputs_embeds=embeds, **layer_inputs(model, embeds), **batch).logits[0]

    with torch.no_grad():
        theirs = [
            logits({"input_ids": torch.from_numpy(sample.input_ids)[None], "use_cache": False})
            for sample in samples
        ]
        row, batch = packed(samples)
        patch(model)
        ours = row.gather(logits(batch))
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert error < bounds(family)[0]


def layer_inputs(model, embeds):
    """What the families with inputs for each layer want beside embeddings of no token: zeros."""
    width = getattr(model.config, "hidden_size_per_layer_input", None)
    if not width:
        return {}
    return {"per_layer_inputs": embeds.new_zeros(*embeds.shape[:2], len(model.model.layers), width)}


@pytest.mark.parametrize("family", PRESENT)
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


@pytest.mark.parametrize("family", SINCE)
def test_a_family_of_a_later_transformers_is_refused_with_the_version(family, monkeypatch):
    monkeypatch.setattr(families, "INSTALLED", "5.11.0")
    config = CONFIG_MAPPING["llama"]()
    config.model_type = family
    with pytest.raises(FlexmaskError, match=f"it needs {SINCE[family]} or newer"):
        check_family(config)


def test_windows_are_known_of_verified_families_only():
    assert {*ONE_WINDOW, *BY_LAYER_TYPE} <= {*FAMILIES}


@pytest.mark.parametrize("family", [name for name in REASONS if name in CONFIG_MAPPING])
def test_families_that_are_not_exact_are_refused_with_the_reason(family):
    with pytest.raises(FlexmaskError, match="cannot be patched: ") as error:
        check_family(CONFIG_MAPPING[family]())
    assert REASONS[family] in str(error.value)


def test_a_family_that_nobody_verified_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["roformer"](**TINY, is_decoder=True))
    with pytest.raises(
        FlexmaskError, match="'roformer' cannot be patched: its family has not been"
    ):
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
        "The delta rule of hybrids puts N-pass itself up to 1e-5 from its own fp64 result;",
        "where it is further than half of that, the bound is twice that error. A family with",
        "windows or chunks is tested with some far shorter than the samples; they count",
        "positions, and the right mask without them has to fail as clearly. Every family is",
        "tested with `inputs_embeds` too, and on the backends `cpu` and `reference`. What is",
        "not listed is refused by `patch`, by name.",
        "",
        "Of recurrent and convolutional layers the table names the way in which they follow the",
        "tree ([hybrids.md](hybrids.md)); with transformers before 5.17 it is unrolled paths",
        "for all of them. They are held to 1e-10 in fp64 too.",
        "",
        "| model_type | status | layers | condition or reason | transformers |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | exact | {layers(name)} | {note or '-'} | {versions(name)} |"
        for name, note in sorted(FAMILIES.items())
    ]
    lines += [
        f"| {name} | refused | - | {reason} | - |" for name, reason in sorted(REASONS.items())
    ]
    lines += [
        "",
        "A family is named by its text, which may come in a model for images too: qwen3_vl_text",
        "in Qwen3-VL, qwen2 in InternVL, llama in LLaVA. Conversations of text are exact in these,",
        "and `flexmask train` loads them. It freezes what text does not reach, the vision tower,",
        "since DistributedDataParallel stops at a parameter without a gradient; elsewhere set",
        "`requires_grad_(False)` on `flexmask.unreached_parameters(model)`.",
        "A batch that holds images is refused, and so are the labels of a class that computes its",
        "loss without `shift_labels` ([exactness.md](exactness.md)).",
        "",
        "Refused for every family, with the setting's name and value:",
        "",
        "- dropout or router jitter above 0, LoRA's included: N-pass would draw other noise;",
        "- types of layers, windows included, that its family has not been verified with;",
        "- attention to later tokens, and arguments of the attention that are not known here, such",
        "  as `position_bias`;",
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


def layers(family):
    """How a family chooses what its layers see."""
    others = f", and others: {MIXERS[family].way}" if family in MIXERS else ""
    if family == "llama4_text":
        return "full, chunked"
    if family in ONE_WINDOW:
        return f"full, or one window{others}"
    return f"full, windowed{others}" if family in BY_LAYER_TYPE else f"full{others}"


def versions(family):
    """The versions of transformers with which a family has been tried."""
    since = Version(SINCE.get(family, VERSIONS[0]))
    return ", ".join(version for version in VERSIONS if Version(version) >= since)


def test_the_docs_table_is_true():
    if os.environ.get("FLEXMASK_WRITE_DOCS"):
        DOCUMENT.write_text(table())
    assert DOCUMENT.read_text() == table()
