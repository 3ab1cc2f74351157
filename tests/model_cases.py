"""Tiny random models of every family, and the N-pass oracle that they are held to."""

import copy
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from packaging.version import Version
from sample_cases import random_samples
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from flexmask import build_tree, pack
from flexmask.model.families import INSTALLED, SINCE
from flexmask.model.mixers.forward import MixerForward
from flexmask.model.npass import npass_batches
from flexmask.model.windows import BY_LAYER_TYPE, ONE_WINDOW

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 4  # positions; below a branch's length in every sample
WINDOWED = {"sliding_window": WINDOW}
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = _TWO_KINDS | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED_EXPERT = _EXPERTS | {"shared_expert_intermediate_size": 16}
_FEW_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8}
_MAMBA2 |= {"mamba_chunk_size": 8}  # so that samples take several
_KIMI = _TWO_KINDS | {"linear_num_heads": 2, "linear_head_dim": 16}
_KIMI |= {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_KIMI |= _SPARSE | _FEW_LOCAL | {"num_key_value_heads": 4, "moe_intermediate_size": 16}
_KIMI |= {"n_group": 1, "topk_group": 1}
# Small layers of each kind, in families that have several.
HYBRIDS = {
    "qwen3_next": _DELTA | _SHARED_EXPERT,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | _SHARED_EXPERT,
    "olmo_hybrid": _DELTA | {"linear_num_key_heads": 4},
    "lara_mini": _DELTA
    | _SHARED_EXPERT
    | WINDOWED
    | {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}
    | {"num_hidden_layers": 3},
    "kimi_linear": _KIMI,
    "bailing_hybrid": _KIMI,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
    | {"mamba_d_state": 4, "mamba_dt_rank": 4},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64, "mamba_rms_norm": True},
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "tie_word_embeddings": False,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 8,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "tie_word_embeddings": False,
    },
    "minimax": _TWO_KINDS
    | {"block_size": 8, "num_local_experts": 4, "linear_attn_beta_factor": 2}
    | WINDOWED,
    "zaya": _EXPERTS
    | {"layer_types": ["hybrid_sliding", "hybrid"], "num_experts_per_tok": 1}
    | {"router_hidden_size": 8}
    | WINDOWED,
    "granitemoehybrid": _MAMBA2
    | {"layer_types": ["mamba", "attention"]}
    | {"shared_intermediate_size": 16, "num_local_experts": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "ssm_state_size": 8}
    | {"chunk_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16}
    | {"n_groups": 2, "n_routed_experts": 4}
    | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
}
# One of them for each kind of layer.
MIXER_KINDS = ("lfm2", "qwen3_5_text", "bamba", "jamba", "minimax", "zaya")
MIXED = {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {  # heads of 12 for scores and of 8 for values
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 1}
_DEEPSEEK = LATENT | EXPERTS | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
_DEEPSEEK |= {"first_k_dense_replace": 1}
SHARED = {  # layers that share keys and values, and have inputs of their own
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 50,
    **WINDOWED,
}
TOWER = {"depth": 1, "num_heads": 2, "intermediate_size": 16}
_HEARING = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "output_dim": 32}
_HEARING |= {"encoder_ffn_dim": 16, "num_mel_bins": 8, "downsample_hidden_size": 4}
_PYRAMID = {"patch_sizes": [2], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1}
_SIGHT = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
_SIGHT |= {"intermediate_size": 16}
_MUSE = {"out_hidden_size": 64, "projector_hidden_size": 16, "vision_config": _SIGHT}
_16_TO_32 = {"vision_config": TOWER | {"hidden_size": 16, "out_hidden_size": 32}}
# Families that come only inside a model of images and text, and with that what its towers need.
IN_IMAGE_MODELS = {
    "qwen2_vl_text": ("qwen2_vl", {"vision_config": TOWER | {"embed_dim": 16, "hidden_size": 32}}),
    "qwen2_5_vl_text": ("qwen2_5_vl", _16_TO_32),
    "qwen3_vl_text": ("qwen3_vl", _16_TO_32),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", _16_TO_32),
    "glm4v_text": ("glm4v", _16_TO_32),
    "glm4v_moe_text": ("glm4v_moe", _16_TO_32),
    "qwen2_5_omni_text": ("qwen2_5_omni_thinker", _16_TO_32 | {"audio_config": _HEARING}),
    "qwen3_omni_moe_text": (
        "qwen3_omni_moe_thinker",
        _16_TO_32 | {"audio_config": _HEARING, "vision_start_token_id": 50},
    ),
    "mistral4": ("mistral3", {"vision_config": _SIGHT | {"model_type": "pixtral", "head_dim": 8}}),
    "muse_glimmer_text": ("muse_glimmer", _MUSE),
    "muse_spark_text": (
        "muse_spark",
        _MUSE | {"audio_config": _PYRAMID | {"out_hidden_size": 32}},
    ),
    "step3p5": ("step3p7", {"vision_config": _SIGHT | {"image_size": 28}}),
    "ernie4_5_vl_moe_text": ("ernie4_5_vl_moe", {"vision_config": TOWER | {"hidden_size": 16}}),
    "glm_ocr_text": ("glm_ocr", _16_TO_32),
    "cosmos3_edge_text": ("cosmos3_edge", {"vision_config": _SIGHT}),
    "hunyuan_vl_text": ("hunyuan_vl", {"vision_config": _SIGHT}),
}
_AXES = {"mrope_section": [2, 1, 1]}  # of rotary frequencies: time, height and width
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **_AXES}}
_WARM = {  # a temperature that changes within the samples
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5,
    }
}


def _alike(families, settings):
    return dict.fromkeys(families, settings)


# What a family's config needs: to be one that trees are exact on, and to have all that it can have.
SETTINGS = {
    **dict.fromkeys(ONE_WINDOW, WINDOWED),
    **dict.fromkeys(BY_LAYER_TYPE, MIXED),
    **_alike(("qwen2", "qwen3", "smollm3"), {**MIXED, "use_sliding_window": True}),
    "qwen2_moe": MIXED | _SHARED_EXPERT | {"use_sliding_window": True},
    "qwen3_moe": {**WINDOWED, **_EXPERTS, "use_sliding_window": True},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "starcoder2": {**WINDOWED, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "ministral3": {**WINDOWED, **_WARM},
    "mistral4": _DEEPSEEK | _WARM | {"head_dim": 12},
    **HYBRIDS,
    **_alike(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
        {**MIXED, **AXES, "use_sliding_window": True},
    ),
    **_alike(
        ("qwen3_vl_text", "glm4v_text", "hunyuan_vl_text", "glm_ocr_text", "cosmos3_edge_text"),
        AXES,
    ),
    "qwen3_vl_moe_text": AXES | _EXPERTS,
    "qwen3_omni_moe_text": {**AXES, **_EXPERTS, "mlp_only_layers": [0]},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**AXES["rope_parameters"], "mrope_section": [1, 1, 2]},
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": [16, 16],
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_k": 2,
    },
    "muse_glimmer_text": {**MIXED, "layer_rope_theta": [1e4, 0]},
    "muse_spark_text": {
        **MIXED,
        **_SPARSE,
        **_FEW_LOCAL,
        "layer_rope_theta": [1e4, 0],
        "moe_hidden_size": 24,
        "moe_intermediate_size": 16,
    },
    "step3p5": {
        **MIXED,
        **EXPERTS,
        "num_sliding_attention_heads": 8,
        "rope_theta": [1e4, 1e3],
        "partial_rotary_factors": [0.5, 1.0],
        **_SPARSE,
        "swiglu_limits": [0.0, 0.5],
        "n_routed_experts": 4,
        "share_expert_dim": 16,
    },
    "cohere_compass_text": {
        **MIXED,
        "rope_parameters": {"sliding_attention": AXES["rope_parameters"], "full_attention": None},
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4}
        | {"moe_top_k": 2},
    },
    "glm4v_moe_text": {**AXES, **EXPERTS, "n_routed_experts": 4, "head_dim": 16},
    **_alike(("gpt2", "gpt_bigcode"), {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "phimoe": {**WINDOWED, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    **_alike(
        ("gemma2", "vaultgemma"),
        {**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **SHARED,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    **_alike(("gemma4_text", "gemma4_unified_text"), {**SHARED, "global_head_dim": 16}),
    "gpt_oss": MIXED | _FEW_LOCAL,
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 7,
        "floor_scale": 4,
        "attn_scale": 0.5,
        "attn_temperature_tuning": True,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
    },
    **_alike(
        ("deepseek_v2", "sarvam_mla", "glm4_moe_lite"),
        {**LATENT, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "deepseek_v3": _DEEPSEEK,
    **_alike(("sarvam_moe", "glm4_moe", "solar_open"), {**EXPERTS, "n_routed_experts": 4}),
    "dory": {  # the layer in the middle runs twice
        **WINDOWED,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "minicpm3": {**LATENT, "dim_model_base": 32, "scale_emb": 1.0},
    "youtu": LATENT,
    "axk1": {**LATENT, **EXPERTS, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "kolibri1": MIXED | _SHARED_EXPERT,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "minimax_m2": _FEW_LOCAL,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    **_alike(("afmoe", "laguna", "exaone_moe", "mellum"), {**MIXED, **EXPERTS, "num_experts": 4}),
    "hy_v3": {**EXPERTS, "num_experts": 4},
    **_alike(("dots1", "mimo_v2_flash"), {**MIXED, **EXPERTS, "n_routed_experts": 4}),
    "flint": MIXED | _SHARED_EXPERT | {"mlp_only_layers": [0]},
    "beam": MIXED | _EXPERTS | _SPARSE | {"n_group": 2, "topk_group": 1},
    "cohere2_moe": {**MIXED, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe_swa": {**MIXED, "num_local_experts": 4},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0},
}


def supported(families):
    """Those of `families` that the installed transformers gets right."""
    return [name for name in families if Version(SINCE.get(name, "0")) <= Version(INSTALLED)]


def tiny_model(family, seed=0, **settings):
    """A random fp32 model of `family` in training mode, with sdpa unless that leaves a part out."""
    torch.manual_seed(seed)
    # Some configs change the dicts that they are given.
    config = CONFIG_MAPPING[family](**copy.deepcopy(TINY | SETTINGS.get(family, {}) | settings))
    auto, kinds = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
    if family in IN_IMAGE_MODELS:
        around, towers = IN_IMAGE_MODELS[family]
        config = CONFIG_MAPPING[around](text_config=config, **copy.deepcopy(towers))
        auto, kinds = AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    has_sdpa = kinds[type(config)]._supports_sdpa
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    implementation = "sdpa" if has_sdpa and not is_capped else "eager"
    model = auto.from_config(config, attn_implementation=implementation)
    head = model.get_output_embeddings()
    with torch.no_grad():  # larger weights than the usual 0.02, so that attention matters
        for name, parameter in model.named_parameters():
            is_lookup = "embed" in name and (head is None or parameter is not head.weight)
            if parameter.ndim > 1:
                parameter.normal_(0, 1.0 if is_lookup else parameter.shape[-1] ** -0.5)
        for module in model.modules():  # the scale of the scores, which such a family learns
            if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
                module.q_norm.weight.mul_(module.head_dim**-0.5)
    return model.train()


@cache
def npass_case(family):
    """A tiny model, samples, and what N-pass makes of them; to be copied, not changed."""
    model = tiny_model(family)
    samples = random_samples(1)
    return model, samples, npass(copy.deepcopy(model), samples)


@contextmanager
def doubled():
    """A block in which models compute in fp64 throughout, where transformers casts to fp32.

    It does so in norms, softmax and scans.
    """
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch, "float32", torch.float64)
        patches.setattr(torch, "float", torch.float64)
        patches.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def fp64_model(family, **settings):
    """The same model in fp64, to be run inside `doubled`."""
    return to_fp64(tiny_model(family, **settings))


def to_fp64(model):
    """The model itself, with all that it computes by in fp64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no fp64
    model.double()
    for module in model.modules():  # factors that a layer has worked out in fp32
        if hasattr(module, "decay_factors"):
            decays = module.decay_factors(module.slope_rate)
            module.query_decay, module.key_decay, module.diagonal_decay = decays
    return model


@cache
def bounds(family):
    """How far logits and gradients may be from those of N-pass, in fp32: 1e-5 for most families.

    The delta rule solves a triangular system in every chunk and normalises outputs that may be
    small: there N-pass in fp32 is itself up to 1e-5 from N-pass in fp64. Single-pass rounds as
    much, in another order, so the two may be apart by twice that.
    """
    if "linear_num_key_heads" not in HYBRIDS.get(family, {}):
        return 1e-5, 1e-5
    _, samples, theirs = npass_case(family)
    with doubled():
        exact = npass(fp64_model(family), samples)
    logits, _, grads = largest_error(theirs, exact)
    return max(1e-5, 2 * logits), max(1e-5, 2 * grads)


def mixers(model):
    """The patches of a model's recurrent and convolutional layers."""
    patches = (module.__dict__.get("_flexmask") for module in model.modules())
    return [state for state in patches if isinstance(state, MixerForward)]


def packed(samples):
    (row,) = pack([build_tree(samples)])
    return row, row.to_batch()


def padded(samples):
    """All samples in one batch for an unpatched model, with an attention mask."""
    length = max(map(len, samples))
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.from_numpy(sample.input_ids)
        mask[row, : len(sample)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def npass(model, samples):
    """Logits of every sample, the mean loss, and all gradients, from separate sequences."""
    model.zero_grad()
    batches = list(npass_batches(samples))
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    logits, total = [], 0.0
    for batch in batches:
        output = model(**batch, num_items_in_batch=count)
        output.loss.backward()
        logits.append(output.logits[0].detach())
        total += output.loss.item()
    return logits, total, gradients(model)


def single_pass(model, samples, **settings):
    """The same from one packed row."""
    model.zero_grad()
    row, batch = packed(samples)
    output = model(**batch, **settings)
    output.loss.backward()
    return row.gather(output.logits[0].detach()), output.loss.item(), gradients(model)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest_error(ours, theirs):
    """(logits, loss, gradients): absolute for logits, relative for the others.

    A gradient that is zero in exact arithmetic (that of a query which sees one key) is rounding,
    about 8 eps = 1e-6 of the largest one; so none is held to less than 1e-5 of a tenth of that.
    """
    logits = max((a - b).abs().max().item() for a, b in zip(ours[0], theirs[0], strict=True))
    loss = abs(ours[1] - theirs[1]) / abs(theirs[1])
    assert ours[2].keys() == theirs[2].keys()
    scale = max(g.abs().max().item() for g in theirs[2].values())
    grads = max(
        ((ours[2][n] - g).norm() / g.norm().clamp_min(0.1 * scale)).item()
        for n, g in theirs[2].items()
    )
    return logits, loss, grads
