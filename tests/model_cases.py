"""Tiny random models of every family, and the N-pass oracle that they are held to."""

import copy
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from packaging.version import Version
from strategies import random_samples
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flexmask import build_tree, pack
from flexmask.model.families import INSTALLED, NEEDS
from flexmask.npass import npass_batches

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
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = _TWO_KINDS | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8}
_MAMBA2 |= {"mamba_chunk_size": 8}  # so that samples take several
# Small layers of each kind, in families that have several.
HYBRIDS = {
    "qwen3_next": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "olmo_hybrid": _DELTA | {"linear_num_key_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
    | {"mamba_d_state": 4, "mamba_dt_rank": 4},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64, "mamba_rms_norm": True},
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA2
    | {"layer_types": ["mamba", "attention"]}
    | {"shared_intermediate_size": 16, "num_local_experts": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "ssm_state_size": 8}
    | {
        "chunk_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
    }
    | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
}
# What a family's config needs to be one that trees are exact on.
SETTINGS = {
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "starcoder2": {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "ministral3": {  # a temperature that changes within the samples
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        },
    },
    **HYBRIDS,
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "phimoe": {"sliding_window": None, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    **{
        family: {"layer_types": ["full_attention"] * 2}
        for family in ("olmo3", "exaone4", "ministral", "afmoe", "cwm")
    },
}


def supported(families):
    """Those of `families` that the installed transformers gets right."""
    needed = {name: NEEDS.get(name, ("0", ""))[0] for name in families}
    return [name for name in families if Version(needed[name]) <= Version(INSTALLED)]


def tiny_model(family, seed=0, **settings):
    """A random fp32 model of `family` in training mode, with sdpa."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**TINY | SETTINGS.get(family, {}) | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():  # larger weights than the usual 0.02, so that attention matters
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif parameter.ndim > 1:
                parameter.normal_()
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
    model = tiny_model(family, **settings)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no fp64
    return model.double()


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


def packed(samples):
    (row,) = pack([build_tree(samples)])
    return row, row.to_batch()


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
