"""Liger's fused loss on trees: its own kernel, in Triton's interpreter."""

import copy
import inspect

import pytest
from model_cases import (
    bounds,
    gradients,
    largest_error,
    npass_case,
    packed,
    supported,
    tiny_model,
)
from strategies import random_samples
from trainer_cases import CONVERSATIONS, arguments, assert_same_weights, npass_weights, parameters
from trainer_cases import trees as weighted_trees

from flexmask import FlexmaskError, TreeCollator, patch
from flexmask.training.trainer import TreeTrainer

pytestmark = pytest.mark.interpreted

# Families that Liger has a fused loss for; its softcap, gemma2's, does not run in the interpreter.
FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "gemma", "gemma3_text", "gemma4_text", "glm4", "gpt_oss"),
    *("llama", "llama4_text", "ministral", "mistral", "mixtral", "nemotron", "olmo2", "olmo3"),
    *("qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "smollm3", "phi3", "falcon_h1"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "exaone4"),
)


def train(model, folder, data=CONVERSATIONS):
    # Of Liger's kernels the loss alone runs in the interpreter; the others know nothing of trees.
    others = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)
    TreeTrainer(
        model=patch(model),
        args=arguments(folder, use_liger_kernel=True, liger_kernel_config=others),
        train_dataset=data,
        data_collator=TreeCollator(),
    ).train()


def test_three_steps_with_the_fused_loss_equal_npass(tmp_path):
    model = tiny_model("llama")
    train(model, tmp_path)
    assert "liger" in model.forward.__func__.__module__
    assert_same_weights(parameters(model), *npass_weights())


@pytest.mark.parametrize("family", supported(FAMILIES))
def test_the_fused_loss_equals_separate_sequences(family):
    from liger_kernel.transformers import monkey_patch

    model, samples, theirs = npass_case(family)
    model = copy.deepcopy(model)
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[family]
    names = set(inspect.signature(apply).parameters) - {"model"}
    apply(model=model, **{name: name == "fused_linear_cross_entropy" for name in names})
    model.zero_grad()
    _, batch = packed(samples)
    output = patch(model)(**batch)
    output.loss.backward()
    assert output.logits is None
    _, loss, grads = largest_error((theirs[0], output.loss.item(), gradients(model)), theirs)
    assert loss < 1e-6
    assert grads < bounds(family)[1]


def test_loss_weights_that_the_fused_loss_would_lose_are_refused(tmp_path):
    with pytest.raises(FlexmaskError, match="computed its loss without loss_weights"):
        train(tiny_model("llama"), tmp_path, weighted_trees("turn"))


def test_a_fused_loss_that_would_shift_the_labels_again_is_refused():
    model = tiny_model("llama")
    original = type(model).forward

    def fused(input_ids=None, labels=None, **kwargs):  # as Liger's once were
        output = original(model, input_ids, **kwargs)
        output.loss = output.logits.sum()
        return output

    model.forward = fused
    _, batch = packed(random_samples(2))
    with pytest.raises(FlexmaskError, match="by itself, without shift_labels"):
        patch(model)(**batch)
