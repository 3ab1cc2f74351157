"""TRL's GRPOTrainer over trees: the same steps as its own, from the same rollouts."""

from importlib.metadata import version

import async_tree_grpo
import numpy as np
import pytest
import torch
import tree_grpo
from datasets import Dataset
from model_cases import tiny_model
from peft import LoraConfig
from trainer_cases import NUM_STEPS, arguments, assert_same_weights, parameters
from tree_grpo import TreeGRPOTrainer
from trl import GRPOConfig, GRPOTrainer

from flexmask import FlexmaskError

pytestmark = pytest.mark.skipif(
    not version("trl").startswith("1.16."), reason="takes TRL 1.16 by its inner parts"
)
NUM_PROMPTS, GROUP = 2, 4
VOCABULARY = 1792  # of the shipped tokenizer


def rollouts(prompts, trainer):
    """Completions of prompts of two lengths; some begin alike, one is another's beginning."""
    own = np.random.default_rng(trainer.state.global_step).integers(0, 50, (len(prompts), 9))
    out = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": []}
    for index, prompt in enumerate(map(int, prompts)):
        text = np.random.default_rng(prompt).integers(0, 50, 6 + 5 * prompt + 9).tolist()
        agreed, length = ((0, 9), (3, 8), (6, 7), (6, 6))[index % GROUP]
        out["prompt_ids"].append(text[:-9])
        out["completion_ids"].append((text[-9:][:agreed] + own[index].tolist())[:length])
        out["env_mask"].append([int(place != 2) for place in range(length)])  # a tool's token
    return out


def variety(completion_ids, **_):
    return [len(set(ids)) + ids[-1] / 50 for ids in completion_ids]


def grpo(kind, folder, tokenizer, family="llama", peft_config=None, **settings):
    """A trainer of three steps from the same rollouts."""
    tiny_model(family, vocab_size=VOCABULARY).save_pretrained(folder)
    return kind(
        model=str(folder),
        reward_funcs=variety,
        args=arguments(
            folder,
            GRPOConfig,
            **{
                "bf16": False,  # which TRL turns on
                "max_steps": NUM_STEPS,
                "num_generations": GROUP,
                "per_device_train_batch_size": NUM_PROMPTS * GROUP,
                "max_completion_length": 9,
                "beta": 0.04,
            }
            | settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(p) for p in range(NUM_PROMPTS)]}),
        rollout_func=rollouts,
        peft_config=peft_config,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_iterations": 2}, id="dapo"),
        pytest.param(
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "per_device_train_batch_size": GROUP,
                "gradient_accumulation_steps": 2,
                "num_iterations": 3,
            },
            id="sequence-level-accumulated",
        ),
        pytest.param(
            {
                "loss_type": "cispo",
                "epsilon_high": 5.0,
                "temperature": 0.7,
                "top_entropy_quantile": 0.5,
                "entropy_coef": 0.01,
            },
            id="cispo-entropy",
        ),
        pytest.param({"family": "qwen3_moe", "router_aux_loss_coef": 0.1}, id="experts"),
        pytest.param({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, id="lora"),
    ],
)
def test_three_steps_are_those_of_trl(tmp_path, tokenizer, settings):
    trainers = []
    for kind in (GRPOTrainer, TreeGRPOTrainer):
        trainer = grpo(kind, tmp_path, tokenizer, **settings)
        before = parameters(trainer.model)
        trainer.train()
        trainers.append(trainer)
    theirs, ours = trainers
    assert_same_weights(parameters(ours.model), before, parameters(theirs.model))
    for log, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert "train_runtime" in log or log.pop("padded_ratio") > 1.5
        assert log.keys() == expected.keys()
        for name in log.keys() - {"step_time"}:
            if "train_" not in name:
                assert log[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, "text only, got pixel_values; use GRPOTrainer"),
        ({"attention_mask": torch.tensor([[0, 0, 1, 1]])}, "every prompt needs a token"),
    ],
    ids=["pictures", "no-prompt"],
)
def test_what_a_tree_cannot_hold_is_refused(tmp_path, tokenizer, changed, message):
    trainer = grpo(TreeGRPOTrainer, tmp_path, tokenizer, beta=0.0)
    ids = torch.tensor([[0, 5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 2}
    with pytest.raises(FlexmaskError, match=message):
        trainer._get_per_token_logps_and_entropies(trainer.model, **batch | changed)


def test_dropout_is_refused_with_the_trainer(tmp_path, tokenizer):
    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1)
    with pytest.raises(FlexmaskError, match=r"dropout must be 0, got 0\.1"):
        grpo(TreeGRPOTrainer, tmp_path, tokenizer, peft_config=lora)


@pytest.mark.parametrize("example", [tree_grpo, async_tree_grpo], ids=lambda m: m.__name__)
def test_an_example_runs_and_shows_what_it_saves(example, capsys):
    torch.manual_seed(0)
    example.main()
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.endswith(" times fewer tokens")
    ]
    assert lines
    assert all(float(line.split()[-4]) > 3 for line in lines)
