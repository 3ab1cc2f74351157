"""Families with recurrent or convolutional layers: exact in fp64, however a model is run."""

import copy
from functools import partial

import pytest
import torch
from model_cases import (
    HYBRIDS,
    MIXER_KINDS,
    doubled,
    fp64_model,
    largest_error,
    mixers,
    npass,
    npass_case,
    packed,
    single_pass,
    supported,
    tiny_model,
)
from strategies import random_samples

from flexmask import FlexmaskError, build_tree, pack, patch, unpatch
from flexmask.model.mixers.kinds import MIXERS, find_mixers
from flexmask.model.tree_attention import is_tree
from flexmask.packing.rows import stack_rows

IDS = torch.arange(12).view(2, 6) % 50


@pytest.fixture(params=supported(MIXER_KINDS))
def family(request):
    return request.param


def test_every_family_with_such_layers_is_tested():
    assert set(HYBRIDS) == set(MIXERS)


SHARED_WEIGHTS = {  # the first and the third attention of zamba2 share their weights
    "num_hidden_layers": 4,
    "layers_block_type": ["hybrid", "hybrid", "hybrid", "linear_attention"],
    "num_mem_blocks": 2,
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((name, {}) for name in supported(HYBRIDS)),
        *((name, SHARED_WEIGHTS) for name in supported(["zamba2"])),
    ],
)
def test_in_fp64_logits_and_gradients_agree_to_ten_digits(family, settings):
    model = fp64_model(family, max_position_embeddings=256, **settings)
    samples = random_samples(3, num_samples=4, stem=30, tail=40)  # several chunks of a scan
    with doubled():
        theirs = npass(copy.deepcopy(model), samples)
        ours = single_pass(patch(model, backend="reference"), samples)
    assert max(largest_error(ours, theirs)) < 1e-10


@pytest.mark.parametrize("family", supported(HYBRIDS))
def test_rows_of_several_trees_with_padding_equal_separate_sequences(family):
    model = fp64_model(family)
    trees = [random_samples(seed, num_samples=seed + 2) for seed in range(3)]
    rows = [*pack([build_tree(trees[0]), build_tree(trees[1])]), *pack([build_tree(trees[2])])]
    with doubled():
        theirs = [logits for samples in trees for logits in npass(model, samples)[0]]
        output = patch(model, backend="reference")(**stack_rows(rows))
    logits = [output.logits[b, : len(row)] for b, row in enumerate(rows)]
    ours = [part for row, values in zip(rows, logits, strict=True) for part in row.gather(values)]
    for part, expected in zip(ours, theirs, strict=True):
        assert (part - expected).abs().max() < 1e-10


def test_lora_equals_npass(family):
    from peft import LoraConfig, get_peft_model

    samples = random_samples(1)
    config = LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules="all-linear",
        exclude_modules=["out_proj"],  # peft itself refuses those of Mamba
    )
    lora = get_peft_model(fp64_model(family), config).double()
    with doubled():
        theirs = npass(lora, samples)
        ours = single_pass(patch(lora, backend="reference"), samples)
    parts = ("mamba", "linear_attn", "conv", "qkv_proj")
    assert any(part in name for part in parts for name in ours[2])
    assert max(largest_error(ours, theirs)) < 1e-10


def test_a_layer_that_the_tree_does_not_reach_is_caught(family):
    model, samples, _ = npass_case(family)
    model = patch(copy.deepcopy(model))
    (first, *_), total = mixers(model), sum("_flexmask" in vars(m) for m in model.modules())
    layer, inner = first.mixer, first.mixer.forward

    def without_mask(*args, **kwargs):
        kwargs = {name: None if is_tree(value) else value for name, value in kwargs.items()}
        return inner(*(None if is_tree(value) else value for value in args), **kwargs)

    layer.forward = without_mask
    num = total - 2  # the model and its decoder stack know of the patch as well
    with pytest.raises(FlexmaskError, match=f"in {num - 1} of {num} layers; the others ignored"):
        model(**packed(samples)[1])


def test_a_forward_that_another_library_wraps_later_is_left_to_it(family):
    model = patch(copy.deepcopy(npass_case(family)[0]))
    (first, *_) = mixers(model)
    first.mixer.forward = wrapper = lambda *args, inner=first.mixer.forward, **kw: inner(
        *args, **kw
    )
    assert torch.isfinite(model(**packed(random_samples(1))[1]).loss)
    unpatch(model)
    assert first.mixer.forward is wrapper
    assert torch.isfinite(model(IDS).logits).all()


def test_a_convolution_in_a_family_that_is_not_known_to_have_one_is_refused(monkeypatch):
    model = copy.deepcopy(npass_case("lfm2")[0])
    monkeypatch.setattr("flexmask.model.checks.MIXERS", {})
    with pytest.raises(FlexmaskError, match="'lfm2' cannot be patched: its Lfm2ShortConv looks"):
        patch(model)


@pytest.mark.parametrize("family", supported(["zaya"]))
def test_a_bias_ahead_of_a_convolution_whose_paths_begin_with_zeros_is_refused(family):
    with pytest.raises(FlexmaskError, match="attention_bias must be off, got True"):
        patch(tiny_model(family, attention_bias=True))


@pytest.mark.parametrize("family", supported(["zaya"]))
def test_a_whole_layer_whose_forward_another_library_has_replaced_is_refused(family):
    model = tiny_model(family)
    layer = find_mixers(model)[0]
    layer.forward = partial(type(layer).forward, layer)
    with pytest.raises(FlexmaskError, match="ZayaCCAProjection has a forward of another library"):
        patch(model)
