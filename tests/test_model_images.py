"""Models of images and text: text in them is exact, anything else is refused."""

import copy

import pytest
import torch
from image_cases import OWN_LOSS, WITH_IMAGES, model_with_images
from model_cases import (
    IN_IMAGE_MODELS,
    largest_error,
    npass,
    packed,
    single_pass,
    supported,
    tiny_model,
)
from strategies import random_samples

from flexmask import FlexmaskError, patch
from flexmask.model.structure import unreached_parameters

TRAINED = [family for family in WITH_IMAGES if family not in OWN_LOSS]


@pytest.mark.parametrize("family", TRAINED)
def test_text_in_a_model_of_images_equals_separate_sequences(family):
    model = model_with_images(family)
    samples = random_samples(1, vocabulary=45)  # without the tokens that stand for images
    theirs = npass(copy.deepcopy(model).eval(), samples)  # some want the kind of tokens to train
    logits, loss, grads = largest_error(single_pass(patch(model), samples), theirs)
    assert logits < 1e-5
    assert loss < 1e-6
    assert grads < 1e-5


@pytest.mark.parametrize("family", OWN_LOSS)
def test_a_loss_that_a_model_computes_by_itself_is_refused(family):
    model = patch(model_with_images(family))
    _, batch = packed(random_samples(1, vocabulary=45))
    with pytest.raises(FlexmaskError, match="computed its loss by itself, without shift_labels"):
        model(**batch)


@pytest.mark.parametrize("family", [*TRAINED, *supported(IN_IMAGE_MODELS)])
def test_text_reaches_all_parameters_but_those_said_to_be_unreached(family):
    model = model_with_images(family) if family in WITH_IMAGES else tiny_model(family)
    _, batch = packed(random_samples(1, vocabulary=45))
    patch(model)(**batch).loss.backward()
    unreached = set(unreached_parameters(model))
    assert unreached or family == "gemma4"  # built without towers
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert (weight.grad is None) == (weight in unreached), name


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids", "input_values"])
def test_images_are_refused(name):
    _, batch = packed(random_samples(1, vocabulary=45))
    model = patch(model_with_images("gemma3"))
    with pytest.raises(FlexmaskError, match=f"is of text only, got {name}"):
        model(**batch, **{name: torch.zeros(1, 3, 28, 28)})
