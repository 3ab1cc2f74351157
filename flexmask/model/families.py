"""Which models are exact on a tree, and why the others are refused.

A family is listed once its packed logits and gradients have been shown equal to those of separate
sequences (`tests/test_model_families.py`). Beside it, `checks` looks at the configuration of
a model, and `reach` knows which families have windows.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

from flexmask.errors import UnsupportedModelError

AUXILIARY = "its auxiliary loss is that of a batch of all samples"
_SOFTCAP = "softcap; not with sdpa, which leaves it out"
_ONE_WAY = "text, with attention to earlier tokens only"
_NO_IMAGES = "text in its model of images"
_THINKER = "text in its thinker, which has a model class of its own"
_LATENT = "multi-head latent attention"

# model_type -> what is worth knowing about the family.
FAMILIES = {
    "llama": "",
    "qwen2": "",
    "qwen2_moe": AUXILIARY,
    "qwen3": "",
    "qwen3_moe": AUXILIARY,
    "mistral": "",
    "mixtral": AUXILIARY,
    "ministral": "",
    "ministral3": "",
    "mistral4": _LATENT,
    "phi": "",
    "phi3": "with longrope, samples up to original_max_position_embeddings",
    "phimoe": f"without jitter; {AUXILIARY}",
    "olmo": "",
    "olmo2": "",
    "olmo3": "",
    "olmoe": AUXILIARY,
    "flex_olmo": AUXILIARY,
    "glm": "",
    "glm4": "",
    "glm4_moe": "",
    "gemma": "",
    "gpt2": "",
    "gpt_neox": "",
    "granite": "",
    "granitemoe": AUXILIARY,
    "smollm3": "",
    "starcoder2": "",
    "seed_oss": "",
    "ernie4_5": "",
    "ernie4_5_moe": AUXILIARY,
    "hunyuan_v1_dense": "",
    "hunyuan_v1_moe": "",
    "minimax_m2": AUXILIARY,
    "apertus": "",
    "arcee": "",
    "afmoe": "",
    "cohere": "",
    "cwm": "",
    "exaone4": "",
    "helium": "",
    "stablelm": "",
    "bitnet": "",
    "persimmon": "",
    "jetmoe": AUXILIARY,
    "laguna": AUXILIARY,
    "hy_v3": "",
    "jais2": "",
    "nanochat": "",
    "nemotron": "",
    "solar_open": "",
    "gemma2": _SOFTCAP,
    "vaultgemma": _SOFTCAP,
    "gemma3_text": _ONE_WAY,
    "gemma3n_text": "",
    "gemma4_text": _ONE_WAY,
    "gemma4_unified_text": _ONE_WAY,
    "gpt_oss": f"attention sinks; {AUXILIARY}",
    "cohere2": "",
    "cohere2_moe": "",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "exaone": "",
    "sarvam_moe": "",
    "sarvam_mla": _LATENT,
    "apertus1p5_text": "",
    "dory": "",
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "axk1": _LATENT,
    "llama4_text": "attention chunks, and a temperature by position; no auxiliary loss is added",
    "dots1": "",
    "exaone_moe": "",
    "mellum": AUXILIARY,
    "granite_swa": "attention sinks",
    "granitemoe_swa": f"attention sinks; {AUXILIARY}",
    "granitemoeshared": AUXILIARY,
    "modernbert-decoder": "",
    "flint": f"attention sinks; {AUXILIARY}",
    "lfm3": "",
    "beam": "",
    "diffllama": "",
    "iquestcoder": "",
    "kolibri1": "",
    "mimo_v2_flash": "attention sinks",
    "aria_text": "",
    "internlm3": "",
    "hyperclovax": "",
    "opt": "",
    "biogpt": "",
    "gpt_bigcode": "",
    "qwen2_vl_text": _NO_IMAGES,
    "qwen2_5_vl_text": _NO_IMAGES,
    "qwen3_vl_text": _NO_IMAGES,
    "qwen3_vl_moe_text": f"{_NO_IMAGES}; {AUXILIARY}",
    "glm4v_text": _NO_IMAGES,
    "glm4v_moe_text": f"{_NO_IMAGES}; {AUXILIARY}",
    "qwen2_5_omni_text": _THINKER,
    "qwen3_omni_moe_text": f"{_THINKER}; {AUXILIARY}",
    "ernie4_5_vl_moe_text": f"{_NO_IMAGES}; {AUXILIARY}",
    "hunyuan_vl_text": _NO_IMAGES,
    "glm_ocr_text": _NO_IMAGES,
    "cosmos3_edge_text": _NO_IMAGES,
    "muse_glimmer_text": _NO_IMAGES,
    "muse_spark_text": _NO_IMAGES,
    "step3p5": _NO_IMAGES,
    "cohere_compass_text": "",
    "dbrx": AUXILIARY,
    "minimax": f"lightning attention; {AUXILIARY}",
    "zaya": "compressed convolutional attention",
    "qwen3_next": AUXILIARY,
    "qwen3_5_text": "",
    "qwen3_5_moe_text": AUXILIARY,
    "olmo_hybrid": "",
    "lara_mini": AUXILIARY,
    "kimi_linear": _LATENT,
    "bailing_hybrid": _LATENT,
    "lfm2": "",
    "lfm2_moe": "",
    "jamba": AUXILIARY,
    "falcon_h1": "",
    "nemotron_h": "",
    "bamba": "",
    "zamba2": "",
    "zamba": "",
    "granitemoehybrid": AUXILIARY,
}
# model_type -> the first version of transformers that has it, or has it in a form to be patched.
SINCE = {
    # Older ones mix up the chunks of their scan without mamba_ssm.
    **dict.fromkeys(("nemotron_h", "zamba2"), "5.17.0"),
    **dict.fromkeys(("granite_swa", "granitemoe_swa", "minicpm3", "axk1"), "5.17.0"),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text"), "5.17.0"),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "mimo_v2_flash", "kimi_linear"), "5.17.0"),
    **dict.fromkeys(("nemotron", "diffllama", "modernbert-decoder"), "5.17.0"),
    **dict.fromkeys(("qwen2_5_omni_text", "qwen3_omni_moe_text"), "5.17.0"),
    **dict.fromkeys(("ernie4_5_vl_moe_text", "hunyuan_vl_text", "step3p5"), "5.17.0"),
    **dict.fromkeys(("glm_ocr_text", "cosmos3_edge_text"), "5.17.0"),
    **dict.fromkeys(("dbrx", "minimax", "zaya", "zamba"), "5.17.0"),
    **dict.fromkeys(("muse_glimmer_text", "cohere_compass_text"), "5.17.0"),
    "muse_spark_text": "5.23.0",
    **dict.fromkeys(("flint", "lfm3", "beam", "internlm3"), "5.23.0"),
    **dict.fromkeys(("iquestcoder", "kolibri1", "bailing_hybrid"), "5.23.0"),
    **dict.fromkeys(("exaone", "sarvam_moe", "sarvam_mla", "apertus1p5_text"), "5.24.0"),
    **dict.fromkeys(("dory", "lara_mini"), "5.24.0"),
}
# Versions of transformers with which they have been verified.
VERSIONS = ("5.12.0", "5.17.0", "5.23.0", "5.24.0")
INSTALLED = transformers.__version__

_INDEXER = "an indexer chooses the keys of each query by their order in the row"
_DISTANCE = "its attention adds a bias by the distance in the row, and convolves keys and values"
_RECURRENT = "it has recurrent layers only, and takes no positions"
_NO_INTERFACE = "it computes its attention outside the attention interface"

# model_type -> why single-pass training would not be exact, for families that people ask for.
REASONS = {
    "deepseek_v32": _INDEXER,
    "glm_moe_dsa": _INDEXER,
    **dict.fromkeys(
        ("hy_v4", "hy_v4_vl_text", "axk2", "dots3_note_text", "qwen4_exp_text"), _INDEXER
    ),
    **dict.fromkeys(("mistral_large4_text", "minimax_m3_vl_text", "glm5_next_text"), _INDEXER),
    "deepseek_v4": "its attention sees keys that are pooled over runs of the row",
    **dict.fromkeys(("inkling_text", "inkling2_text", "inkling2_loop_text"), _DISTANCE),
    "hrm_text": "it runs its layers several times over, and lets a prompt see its own later tokens",
    "blt": "it pools bytes to patches along the row, and hashes each with those before it",
    "diffusion_gemma_text": "it fills in blocks whose tokens see later ones",
    "molmo2_text": "its model of images makes the mask, and wants the kind of every token to train",
    "mllama_text_model": "some of its layers attend to images only",
    "phi4_multimodal": "its models of images and sound stand inside its decoder stack",
    "recurrent_gemma": "its recurrence is written out in its layers",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), _RECURRENT),
    **dict.fromkeys(("bloom", "falcon", "gptj", "gpt_neo", "codegen", "mpt"), _NO_INTERFACE),
    **dict.fromkeys(("xglm", "gpt_neox_japanese", "openai-gpt"), _NO_INTERFACE),
    "doge": "it makes a mask of its own from the values",
    "longcat_flash": "it has two attentions a layer",
}


def check_family(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, unless the family is verified."""
    kind = config.model_type
    since = SINCE.get(kind)
    if since and Version(INSTALLED) < Version(since):
        raise UnsupportedModelError(
            f"model_type {kind!r} cannot be patched with transformers {INSTALLED}: "
            f"it needs {since} or newer"
        )
    if kind not in FAMILIES:
        reason = REASONS.get(kind, "its family has not been verified")
        raise UnsupportedModelError(
            f"model_type {kind!r} cannot be patched: {reason}; docs/models.md lists those that can"
        )
