"""Models of images and text: text in them is exact, anything else is refused."""

import pytest
import torch
from model_cases import IN_IMAGE_MODELS, SETTINGS, TINY, TOWER, packed, supported, tiny_model
from packaging.version import Version
from strategies import random_samples
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from flexmask import FlexmaskError, patch
from flexmask.model.families import INSTALLED
from flexmask.model.structure import unreached_parameters

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IMAGES = {"image_token_index": 49, "boi_token_index": 47, "eoi_token_index": 48}
WITH_IMAGES = {
    "gemma3": ("gemma3_text", {"vision_config": VISION, "mm_tokens_per_image": 4} | IMAGES),
    "gemma4": (
        "gemma4_text",
        {"vision_config": None, "audio_config": None}
        | {"image_token_id": 49, "video_token_id": 48, "audio_token_id": 47},
    ),
    "internvl": (
        "qwen2",
        {"vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]}}
        | {"image_token_id": 49},
    ),
    "llava": (
        "llama",
        {"vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 49},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {"vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}}
        | {"image_token_id": 49},
    ),
    "llama4": ("llama4_text", {"vision_config": VISION} | IMAGES),
    "kimi_k25": ("deepseek_v3", {"vision_config": VISION, "projection_hidden_size": 16}),
    "nemotron_h_omni": (
        "nemotron_h",
        {"vision_config": VISION | {"video_temporal_patch_size": 2}, "vision_hidden_size": 16},
    ),
    "exaone4_5": ("exaone4", {"vision_config": TOWER | {"hidden_size": 16, "out_hidden_size": 32}}),
    "cohere2_vision": ("cohere2", {"vision_config": VISION, "alignment_intermediate_size": 32}),
    "glm46v": ("glm4v_text", {"vision_config": TOWER | {"hidden_size": 16, "out_hidden_size": 32}}),
    "smolvlm": ("llama", {"vision_config": VISION}),
    "llava_onevision": ("qwen2", {"vision_config": VISION | {"model_type": "siglip_vision_model"}}),
    "lfm2_vl": ("lfm2", {"vision_config": VISION | {"model_type": "siglip2_vision_model"}}),
    "mistral3": (
        "mistral",
        {
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": 49,
        },
    ),
}


def model_with_images(family):
    """A random model of several kinds of input, in training mode."""
    text, settings = WITH_IMAGES[family]
    torch.manual_seed(0)
    tower = TINY | SETTINGS.get(text, {}) | {"model_type": text}
    config = CONFIG_MAPPING[family](text_config=tower, **settings)
    return AutoModelForImageTextToText.from_config(config).train()


if INSTALLED == "5.24.0":  # there the model raises by itself: its text has no image_outputs
    del WITH_IMAGES["llama4"]
if Version(INSTALLED) < Version("5.17"):  # hands no shift_labels to its loss, and is refused
    del WITH_IMAGES["qwen3_5"]
if Version(INSTALLED) < Version("5.23"):
    for family, (text, _) in list(WITH_IMAGES.items()):
        if family not in CONFIG_MAPPING or text not in supported([text]):
            del WITH_IMAGES[family]


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_text_in_a_model_of_images_equals_separate_sequences(family):
    model = model_with_images(family)
    samples = random_samples(1, vocabulary=45)  # without the tokens that stand for images
    marks = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
    with torch.no_grad():
        theirs = []
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids)[None]
            kinds = {marks[family]: torch.zeros_like(ids)} if family in marks else {}
            theirs.append(model(input_ids=ids, **kinds).logits[0])
        row, batch = packed(samples)
        ours = row.gather(patch(model)(**batch).logits[0])
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-5


@pytest.mark.parametrize("family", [*WITH_IMAGES, *supported(IN_IMAGE_MODELS)])
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
