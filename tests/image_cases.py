"""Tiny random models of images, or sound, and text."""

import torch
from model_cases import SETTINGS, TINY, TOWER, supported
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

from flexmask.model.families import INSTALLED

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
    "qwen2_audio": (
        "qwen2",
        {"audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2}}
        | {"audio_token_index": 49},
    ),
    "mistral3": (
        "mistral",
        {
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": 49,
        },
    ),
}
OWN_LOSS = ["qwen2_audio"]  # they compute their loss in their forward, without shift_labels
if INSTALLED == "5.24.0":  # there the model raises by itself: its text has no image_outputs
    del WITH_IMAGES["llama4"]
if Version(INSTALLED) < Version("5.17"):
    OWN_LOSS += ["gemma3", "llama4"]
    del WITH_IMAGES["qwen3_5"]  # hands no shift_labels to its loss, and is refused
if Version(INSTALLED) < Version("5.23"):
    for family, (text, _) in list(WITH_IMAGES.items()):
        if family not in CONFIG_MAPPING or text not in supported([text]):
            del WITH_IMAGES[family]


def model_with_images(family):
    """A random model of several kinds of input, in training mode."""
    text, settings = WITH_IMAGES[family]
    torch.manual_seed(0)
    tower = TINY | SETTINGS.get(text, {}) | {"model_type": text}
    config = CONFIG_MAPPING[family](text_config=tower, **settings)
    return AutoModelForMultimodalLM.from_config(config).train()
