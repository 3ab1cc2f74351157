"""Which models are exact on a tree, and why the others are refused.

A family is listed once its packed logits and gradients have been shown equal to those of separate
sequences (`tests/test_model_families.py`). Beside it, `checks` looks at the configuration of
a model, and `windows` knows which families have windows.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

from flexmask.errors import UnsupportedModelError

AUXILIARY = "its auxiliary loss is that of a batch of all samples"
_NO_IMAGES = "text in its model of images"
_THINKER = "text in its thinker, which has a model class of its own"
_LATENT = "multi-head latent attention"
_DISTANCE = "its attention adds a bias by the distance in the row, and convolves keys and values"
_NO_INTERFACE = "it computes its attention outside the attention interface"


def _by_family(table: dict[str, str]) -> dict[str, str]:
    """The keys of a table by the model_types that it lists under them."""
    return {family: key for key, families in table.items() for family in families.split()}


# model_type -> what is worth knowing about the family.
FAMILIES = _by_family(
    {
        "": (
            "llama qwen2 qwen3 mistral ministral ministral3 phi olmo olmo2 olmo3 glm glm4 glm4_moe "
            "gemma gpt2 gpt_neox granite smollm3 starcoder2 seed_oss ernie4_5 hunyuan_v1_dense "
            "hunyuan_v1_moe apertus arcee afmoe cohere cwm exaone4 helium stablelm bitnet "
            "persimmon hy_v3 jais2 nanochat nemotron solar_open gemma3n_text cohere2 cohere2_moe "
            "exaone sarvam_moe apertus1p5_text dory dots1 exaone_moe modernbert-decoder lfm3 beam "
            "diffllama iquestcoder kolibri1 aria_text internlm3 hyperclovax opt biogpt gpt_bigcode "
            "cohere_compass_text qwen3_5_text olmo_hybrid lfm2 lfm2_moe falcon_h1 nemotron_h bamba "
            "zamba2 zamba"
        ),
        AUXILIARY: (
            "qwen2_moe qwen3_moe mixtral olmoe flex_olmo granitemoe ernie4_5_moe minimax_m2 jetmoe "
            "laguna mellum granitemoeshared dbrx qwen3_next qwen3_5_moe_text lara_mini jamba "
            "granitemoehybrid"
        ),
        _LATENT: (
            "mistral4 deepseek_v2 deepseek_v3 glm4_moe_lite sarvam_mla minicpm3 youtu axk1 "
            "kimi_linear bailing_hybrid"
        ),
        "with longrope, samples up to original_max_position_embeddings": "phi3",
        f"without jitter; {AUXILIARY}": "phimoe",
        "softcap; not with sdpa, which leaves it out": "gemma2 vaultgemma",
        "text, with attention to earlier tokens only": (
            "gemma3_text gemma4_text gemma4_unified_text"
        ),
        f"attention sinks; {AUXILIARY}": "gpt_oss granitemoe_swa flint",
        "attention chunks, and a temperature by position; no auxiliary loss is added": (
            "llama4_text"
        ),
        "attention sinks": "granite_swa mimo_v2_flash",
        _NO_IMAGES: (
            "qwen2_vl_text qwen2_5_vl_text qwen3_vl_text glm4v_text hunyuan_vl_text glm_ocr_text "
            "cosmos3_edge_text muse_glimmer_text muse_spark_text step3p5"
        ),
        f"{_NO_IMAGES}; {AUXILIARY}": "qwen3_vl_moe_text glm4v_moe_text ernie4_5_vl_moe_text",
        _THINKER: "qwen2_5_omni_text",
        f"{_THINKER}; {AUXILIARY}": "qwen3_omni_moe_text",
        f"lightning attention; {AUXILIARY}": "minimax",
        "compressed convolutional attention": "zaya",
    }
)
# model_type -> the first version of transformers that has it, or has it in a form to be patched;
# versions before mix up the chunks of the scan of nemotron_h and zamba2 without mamba_ssm.
SINCE = _by_family(
    {
        "5.17.0": (
            "nemotron_h zamba2 granite_swa granitemoe_swa minicpm3 axk1 qwen3_vl_text "
            "qwen3_vl_moe_text glm4v_text glm4v_moe_text mimo_v2_flash kimi_linear nemotron "
            "diffllama modernbert-decoder qwen2_5_omni_text qwen3_omni_moe_text "
            "ernie4_5_vl_moe_text hunyuan_vl_text step3p5 glm_ocr_text cosmos3_edge_text dbrx "
            "minimax zaya zamba muse_glimmer_text cohere_compass_text"
        ),
        "5.23.0": "muse_spark_text flint lfm3 beam internlm3 iquestcoder kolibri1 bailing_hybrid",
        "5.24.0": "exaone sarvam_moe sarvam_mla apertus1p5_text dory lara_mini",
    }
)
# Versions of transformers with which they have been verified.
VERSIONS = ("5.12.0", "5.17.0", "5.23.0", "5.24.0")
INSTALLED = transformers.__version__

# model_type -> why single-pass training would not be exact, for families that people ask for.
REASONS = _by_family(
    {
        "an indexer chooses the keys of each query by their order in the row": (
            "deepseek_v32 glm_moe_dsa hy_v4 hy_v4_vl_text axk2 dots3_note_text qwen4_exp_text "
            "mistral_large4_text minimax_m3_vl_text glm5_next_text"
        ),
        "its attention sees keys that are pooled over runs of the row": "deepseek_v4",
        _DISTANCE: "inkling_text inkling2_text inkling2_loop_text",
        "it runs its layers several times over, and lets a prompt see its own later tokens": (
            "hrm_text"
        ),
        "it pools bytes to patches along the row, and hashes each with those before it": "blt",
        "it fills in blocks whose tokens see later ones": "diffusion_gemma_text",
        "its model of images makes the mask, and wants the kind of every token to train": (
            "molmo2_text"
        ),
        "some of its layers attend to images only": "mllama_text_model",
        "its models of images and sound stand inside its decoder stack": "phi4_multimodal",
        "its recurrence is written out in its layers": "recurrent_gemma",
        "it has recurrent layers only, and takes no positions": (
            "mamba mamba2 falcon_mamba rwkv xlstm"
        ),
        _NO_INTERFACE: "bloom falcon gptj gpt_neo codegen mpt xglm gpt_neox_japanese openai-gpt",
        "it makes a mask of its own from the values": "doge",
        "it has two attentions a layer": "longcat_flash",
    }
)


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
