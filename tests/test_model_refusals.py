"""What `patch` and a patched model refuse: everything that would not be N-pass."""

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from model_cases import TINY, largest_error, npass, packed, single_pass, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from strategies import random_samples
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from flexmask import FlexmaskError, disabled, patch, unpatch
from flexmask.model.load import random_model

IDS = torch.arange(12).view(2, 6)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
WINDOWED = ["sliding_attention", "full_attention"]
LIMITS = {"max_position_embeddings": 64, "original_max_position_embeddings": 64}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def batch():
    return packed(random_samples(2))[1]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ("gpt2", {"resid_pdrop": 0.1}, "resid_pdrop must be 0, got 0.1"),
        ("starcoder2", {"embedding_dropout": 0.2}, "embedding_dropout must be 0, got 0.2"),
        ("phimoe", {"router_jitter_noise": 0.01}, "router_jitter_noise must be 0, got 0.01"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention must be off, got True"),
        (
            "gemma2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "need attention_chunk_size to be at least 1, got None",
        ),
        ("granite", {"layer_types": WINDOWED}, "'sliding_attention' have not been verified in it"),
        ("granite", {"sliding_window": 8}, "'sliding_attention' have not been verified in it"),
        ("gemma2", {"sliding_window": 0}, "need sliding_window to be at least 1, got 0"),
    ],
)
def test_settings_that_are_not_exact_are_refused_with_the_reason(family, settings, message):
    model = tiny_model(family, **settings)
    with pytest.raises(FlexmaskError, match=f"'{family}' cannot be patched: .*({message})"):
        patch(model)
    assert not any("_flexmask" in vars(module) for module in model.modules())


def test_a_window_that_is_switched_off_is_no_window():
    types = ["full_attention"] * 2
    patch(tiny_model("qwen2", use_sliding_window=False, sliding_window=8, layer_types=types))


def test_an_attention_of_its_own_that_leaves_out_the_softcap_is_refused():
    model = tiny_model("gemma2")
    model.config._attn_implementation = "sdpa"  # which newer transformers do not allow
    with pytest.raises(FlexmaskError, match=r"'sdpa', leaves out attn_logit_softcapping = 2.0"):
        patch(model)
    assert random_model(model.config).config._attn_implementation == "eager"


def test_rejects_what_is_no_model():
    with pytest.raises(FlexmaskError, match="holds no Hugging Face model"):
        patch(nn.Linear(1, 1))


def test_rejects_another_head():
    config = CONFIG_MAPPING["llama"](**TINY)
    classifier = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(FlexmaskError, match="another head than a language model's"):
        patch(classifier)


class Talker(PreTrainedModel):
    """A language model inside another that computes no loss, as in Qwen-Omni."""

    _supports_sdpa = True

    def __init__(self, thinker):
        super().__init__(thinker.config)
        self.thinker = thinker


def test_rejects_a_model_around_a_head_that_computes_no_loss(model):
    with pytest.raises(FlexmaskError, match="Talker has another head than a language model's"):
        patch(Talker(model))


def test_rejects_an_unknown_backend(model):
    with pytest.raises(FlexmaskError, match="backend must be 'auto' or one of"):
        patch(model, backend="cuda")


def test_rejects_the_dropout_of_lora(model):
    lora = get_peft_model(model, LoraConfig(lora_dropout=0.1, target_modules=["q_proj"]))
    with pytest.raises(FlexmaskError, match=r"dropout must be 0, got 0.1 in .*lora_dropout"):
        patch(lora)


def test_rejects_noise_that_is_turned_on_later(model, batch):
    lora = get_peft_model(patch(model), LoraConfig(lora_dropout=0.1, target_modules=["q_proj"]))
    lora.eval()(**batch)
    with pytest.raises(FlexmaskError, match=r"dropout must be 0, got 0.1 in .*lora_dropout"):
        lora.train()(**batch)


def test_rejects_neftune(model, batch):
    patch(model).train().get_input_embeddings().neftune_noise_alpha = 5  # as a Trainer sets it
    with pytest.raises(FlexmaskError, match="neftune_noise_alpha must be 0, got 5"):
        model(**batch)


def test_rejects_prompt_learning(model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(FlexmaskError, match="PROMPT_TUNING puts virtual tokens before the row"):
        patch(get_peft_model(model, config))


def test_rejects_prompt_learning_that_comes_later(model, batch):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(FlexmaskError):
        get_peft_model(patch(model), config)(**batch)


def test_our_attention_without_a_patch_is_an_error():
    config = CONFIG_MAPPING["llama"](**TINY)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask")
    with pytest.raises(FlexmaskError, match="set on a model that is not patched"):
        model(IDS)


@pytest.mark.parametrize(("family", "rope"), [("llama", DYNAMIC), ("phi3", LONGROPE)])
def test_a_rotary_embedding_of_the_whole_batch_is_refused_past_its_limit(family, rope):
    model = tiny_model(family, rope_parameters=rope, **LIMITS)
    short, long = random_samples(0), random_samples(0, num_samples=13)
    theirs = npass(model, short)
    patch(model)
    assert max(largest_error(single_pass(model, short), theirs)) < 1e-5
    with pytest.raises(FlexmaskError, match=r"samples must have at most 6[34] tokens.*got 83"):
        single_pass(model, long)


@pytest.mark.parametrize(("family", "rope"), [("llama", DYNAMIC), ("phi3", LONGROPE)])
def test_what_that_refuses_would_not_be_exact(family, rope, monkeypatch):
    monkeypatch.setattr("flexmask.model.adapter.max_exact_length", lambda config: None)
    model = tiny_model(family, rope_parameters=rope, **LIMITS)
    samples = random_samples(0, num_samples=13)
    theirs = npass(model, samples)
    assert largest_error(single_pass(patch(model), samples), theirs)[0] > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, "needs position_ids, .* not 0, 1, 2"),
        ({"position_ids": IDS[:1]}, "must have the same shape"),
        ({"subtree_end": IDS[:1], "position_ids": IDS[:1]}, r"must be \[B, L\] = \[1, 54\]"),
        ({"subtree_end": torch.zeros(1, 54, dtype=int)}, r"subtree_end\[0\] must be in \[1, 54\]"),
        ({"position_ids": torch.arange(54)[None]}, r"position_ids\[\d+\] must be \d+, the number"),
        ({"attention_mask": IDS}, "takes no attention_mask"),
        ({"past_key_values": object()}, "takes no past_key_values"),
        ({"cache": object()}, "takes no cache"),
        ({"output_attentions": True}, "has no attention weights"),
        ({"shift_labels": None}, "needs shift_labels"),
        ({"labels": None, "loss_weights": torch.ones(1, 54)}, "loss_weights need labels"),
        ({"labels": None}, "shift_labels need labels.*label_smoothing_factor must be 0"),
        ({"loss_weights": torch.ones(1, 53)}, "loss_weights must have the shape of shift_labels"),
    ],
)
def test_rejects_a_tree_batch_that_is_ambiguous(model, batch, change, message):
    with pytest.raises(FlexmaskError, match=message):
        patch(model)(**batch | change)


@pytest.mark.parametrize(
    ("given", "described"),
    [(None, "None"), ("Qwen/Qwen3-4B", "'Qwen/Qwen3-4B'"), (TINY, "a dict")],
)
@pytest.mark.parametrize("call", [patch, unpatch, lambda model: disabled(model).__enter__()])
def test_what_is_no_model_is_refused_by_its_name(call, given, described):
    with pytest.raises(FlexmaskError, match=f"takes a model, got {described}; load one with Auto"):
        call(given)


def test_rejects_positional_arguments(model, batch):
    with pytest.raises(FlexmaskError, match="takes keyword arguments"):
        patch(model.model)(batch["input_ids"], None, subtree_end=batch["subtree_end"])


def test_a_layer_that_ignores_the_tree_is_caught(model, batch):
    patch(model)
    lazy = model.model.layers[1].self_attn
    lazy.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(FlexmaskError, match="in 1 of 2 layers; the others ignored the mask"):
        model(**batch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_ignores_the_tree_is_caught_after_a_backward(model, batch, reentrant):
    patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()  # has called all attention again
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(FlexmaskError, match="in 1 of 2 layers"):
        model(**batch)


def test_a_model_that_drops_the_tree_on_its_way_is_caught(model, batch):
    patch(model)
    inner = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: inner(*args, **kwargs)
    with pytest.raises(FlexmaskError, match="in 0 of 2 layers"):
        model(**batch)


def test_a_model_that_drops_subtree_end_is_caught(model, batch):
    patch(model)
    outer = model.forward
    model.forward = lambda subtree_end, **kwargs: outer(**kwargs)
    with pytest.raises(FlexmaskError, match="in 0 of 2 layers"):
        model(**batch)


@pytest.mark.parametrize("name", ["position_bias", "attention_bias", "head_mask", "indices"])
def test_attention_with_an_option_that_is_not_covered_is_refused(model, batch, name):
    pass_on(patch(model), **{name: IDS})
    with pytest.raises(FlexmaskError, match=f"attention with {name} is not exact"):
        model(**batch)


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_rows_cut_between_processes_are_refused(model, batch, name, monkeypatch):
    parallelism = ParallelismConfig()
    setattr(parallelism, name, 2)
    state = {**AcceleratorState._shared_state, "parallelism_config": parallelism}
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)
    with pytest.raises(FlexmaskError, match=f"ParallelismConfig: {name} must be 1, got 2; it cuts"):
        patch(model)(**batch)
    assert model(IDS).logits is not None  # an ordinary batch may be cut


def test_attention_to_later_tokens_is_refused(model, batch):
    pass_on(patch(model), is_causal=False)
    with pytest.raises(FlexmaskError, match="attention to later tokens is not exact"):
        model(**batch)


def test_a_window_that_contradicts_the_configuration_is_refused(model, batch):
    pass_on(patch(model), sliding_window=4)
    with pytest.raises(FlexmaskError, match=r"sliding_window=4, but .* configuration is None"):
        model(**batch)


def pass_on(model, **options):
    """Let the first layer hand `options` to its attention."""
    layer = model.model.layers[0].self_attn
    inner = layer.forward
    layer.forward = lambda **kwargs: inner(**kwargs, **options)


def test_a_loss_that_never_sees_the_weights_is_caught(model, batch):
    patch(model)
    batch["loss_weights"] = torch.ones(1, 54)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(FlexmaskError, match="computed its loss without loss_weights"):
        model(**batch)


@pytest.mark.parametrize("name", ["shift_labels", "loss_weights"])
def test_a_model_that_drops_what_belongs_to_the_loss_is_caught(model, batch, name):
    patch(model)
    batch["loss_weights"] = torch.ones(1, 54)
    outer = model.forward
    model.forward = lambda **kwargs: outer(**{k: v for k, v in kwargs.items() if k != name})
    with pytest.raises(FlexmaskError, match=f"does not hand {name} to its loss function"):
        model(**batch)
