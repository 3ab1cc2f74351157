"""The examples beyond chat: equal to separate sequences, and to the losses of TRL."""

from collections import defaultdict
from importlib.metadata import version
from itertools import pairwise
from types import SimpleNamespace

import agent_rewrites
import dpo_step
import grpo_step
import numpy as np
import pytest
import torch
from comparison import changed_copy, compare, score_separately
from fp64_llama import fp64_llama
from model_cases import tiny_model

from flexmask import Sample, build_tree, pack, patch

needs_trl = pytest.mark.skipif(
    not version("trl").startswith("1.16."), reason="reads what TRL 1.16 computes by its own means"
)
VOCABULARY = 50  # of the tiny models


def rollouts(seed, prompt=9, number=4):
    """A group with one prompt; two of them begin alike, one is another's beginning."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (number, prompt + 8))
    ids[:, :prompt] = ids[0, :prompt]
    ids[1, : prompt + 3] = ids[0, : prompt + 3]
    lengths = [prompt + 8, prompt + 6, prompt + 8, prompt + 7]
    ids[3, : prompt + 7] = ids[2, : prompt + 7]
    return [
        Sample(row[:length], np.arange(length) >= prompt, (seed, key))
        for key, (row, length) in enumerate(zip(ids, lengths, strict=True))
    ]


def pairs(seed):
    """Chosen and rejected answers at two turns of one conversation."""
    rng = np.random.default_rng(seed)
    history = rng.integers(0, VOCABULARY, 12).tolist()
    samples = []
    for length in (6, 12):
        for _ in range(2):
            answer = rng.integers(0, VOCABULARY, 5).tolist()
            weights = [0] * length + [1] * 5
            samples.append(Sample(history[:length] + answer, weights))
    return samples


@pytest.fixture(params=["float64", "float32"])
def policy(request):
    """A patched model, and how far two ways to one loss may differ in its precision."""
    if request.param == "float64":
        return patch(fp64_llama(), backend="reference"), 1e-10
    return patch(tiny_model("llama")), 1e-5


class Case:
    """One row, its samples, and what the losses take beside the policy's own figures."""

    def __init__(self, model, groups):
        dtype = next(model.parameters()).dtype
        self.model = model
        self.samples = [sample for group in groups for sample in group]
        (self.row,) = pack([build_tree(group) for group in groups])
        self.masks = [torch.from_numpy(s.loss_weights).to(dtype) for s in self.samples]
        self.advantages = torch.linspace(-1.5, 2, len(self.samples), dtype=dtype)
        torch.manual_seed(0)
        with torch.no_grad():
            self.old, self.reference = (
                score_separately(changed_copy(model, scale), self.samples)[0]
                for scale in (0.02, 0.04)
            )

    def grpo_loss(self, scores):
        return grpo_step.grpo_loss(*scores, self.old, self.reference, self.masks, self.advantages)

    def dpo_loss(self, logprobs):
        return dpo_step.dpo_loss(logprobs, self.reference, self.masks)

    @property
    def separately(self):
        return score_separately(self.model, self.samples)


def differences(model, loss, separate):
    model.zero_grad()
    loss.backward()
    return compare(model, loss, separate)


def test_a_grpo_step_equals_separate_sequences(policy):
    model, bound = policy
    case = Case(model, [rollouts(0), rollouts(1)])
    loss = case.grpo_loss(grpo_step.score(model, case.row))
    assert max(differences(model, loss, case.grpo_loss(case.separately))) <= bound
    ratios = torch.cat(case.separately[0]) - torch.cat(case.old)
    assert (ratios.exp() > 1 + grpo_step.CLIP).any()  # both ends of the clip are in use
    assert (ratios.exp() < 1 - grpo_step.CLIP).any()


def test_a_dpo_step_equals_separate_sequences(policy):
    model, bound = policy
    case = Case(model, [pairs(0), pairs(1)])
    loss = case.dpo_loss(dpo_step.score(model, case.row))
    assert max(differences(model, loss, case.dpo_loss(case.separately[0]))) <= bound


def test_advantages_of_either_sign_merge_into_one_product(policy):
    model, bound = policy
    case = Case(model, [rollouts(0), pairs(1)])
    pairs_of = zip(case.advantages, case.samples, strict=True)
    weights = [advantage.item() * sample.loss_weights for advantage, sample in pairs_of]
    loss = agent_rewrites.one_pass_loss(model, case.row, weights)
    separate = agent_rewrites.separate_loss(model, case.samples, weights)
    assert max(differences(model, loss, separate)) <= bound


@pytest.mark.parametrize("max_tokens", [30, 45])
def test_rollouts_that_are_split_over_rows_keep_their_logprobs(max_tokens):
    model = patch(fp64_llama(), backend="reference")
    samples = rollouts(0) + rollouts(2)
    rows = pack([build_tree(samples[:4]), build_tree(samples[4:])], max_tokens)
    assert len(rows) > 1
    scored = {}
    for row in rows:
        scored |= dict(zip(row.keys, grpo_step.score(model, row)[0], strict=True))
    for sample, logprobs in zip(samples, score_separately(model, samples)[0], strict=True):
        torch.testing.assert_close(scored[sample.key], logprobs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("example", [grpo_step, dpo_step, agent_rewrites], ids=lambda m: m.__name__)
def test_an_example_runs_and_shows_what_it_saves(example, capsys):
    torch.manual_seed(0)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    losses, found, savings = lines[0::3], lines[1::3], lines[2::3]
    assert losses
    assert len(losses) == len(found) == len(savings)
    for line in found:
        assert line.startswith("relative difference: loss ")
        assert max(float(part.split()[-1]) for part in line.split(",")) <= 1e-5
    for line in savings:
        assert float(line.removesuffix(" times fewer").split()[-1]) > 1.5


def test_rewritten_steps_share_what_they_have_in_common():
    steps = agent_rewrites.run_agent(0)
    contexts = [s.input_ids[s.loss_weights == 0] for s in steps]
    assert not any((b[: len(a)] == a).all() for a, b in pairwise(contexts[4:]))
    assert build_tree(steps).num_tokens < sum(map(len, steps))


def padded(rows, left):
    """Tensors [n] as one [B, T], filled up with zeros."""
    width = max(map(len, rows))
    return torch.stack(
        [
            torch.nn.functional.pad(r, (width - len(r), 0) if left else (0, width - len(r)))
            for r in rows
        ]
    )


@needs_trl
def test_the_grpo_loss_is_that_of_trl():
    from trl import GRPOTrainer

    case = Case(tiny_model("llama"), [rollouts(0), rollouts(1)])
    logprobs, entropies = case.separately
    table = {
        name: padded(values, left=False)
        for name, values in {
            "logprobs": logprobs,
            "entropies": entropies,
            "old": case.old,
            "reference": case.reference,
            "masks": case.masks,
        }.items()
    }
    as_trl = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            *(table["logprobs"], table["entropies"]),
            None,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=True,
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        beta=grpo_step.KL_WEIGHT,
        current_gradient_accumulation_steps=1,
        entropy_coef=grpo_step.ENTROPY_WEIGHT,
        epsilon_high=grpo_step.CLIP,
        epsilon_low=grpo_step.CLIP,
        importance_sampling_level="token",
        loss_type="grpo",
        model=case.model,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
    )
    nothing = torch.zeros(len(case.samples), 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": table["masks"].long(),
        "completion_mask": table["masks"],
        "advantages": case.advantages,
        "old_per_token_logps": table["old"],
        "ref_per_token_logps": table["reference"],
    }
    theirs = GRPOTrainer._compute_loss(as_trl, case.model, inputs)
    ours = case.grpo_loss((logprobs, entropies))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@needs_trl
def test_the_dpo_loss_is_that_of_trl():
    from trl import DPOTrainer

    case = Case(tiny_model("llama"), [pairs(0), pairs(1)])
    logprobs, _ = case.separately

    def chosen_first(values):
        return padded(values[0::2] + values[1::2], left=False)

    masks = chosen_first(case.masks)

    def as_model(values):
        """A model that gives back log-probabilities, and nothing else of interest."""
        counted = (chosen_first(values) * masks)[:, 1:]
        return lambda **_: SimpleNamespace(
            log_probs=counted,
            entropy=torch.zeros_like(counted),
            mean_logits=torch.zeros_like(counted),
            is_top1=torch.zeros_like(counted, dtype=torch.bool),
        )

    policy = as_model(logprobs)
    as_trl = SimpleNamespace(
        _metrics=defaultdict(lambda: defaultdict(list)),
        _tp_size=1,
        _total_train_tokens=0,
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        beta=dpo_step.BETA,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=case.model,
        precompute_ref_logps=False,
        ref_model=as_model(case.reference),
        use_weighting=False,
    )
    inputs = {"input_ids": masks.long(), "attention_mask": masks, "completion_mask": masks}
    theirs = DPOTrainer._compute_loss(as_trl, policy, inputs, return_outputs=False)
    torch.testing.assert_close(case.dpo_loss(logprobs), theirs, rtol=1e-5, atol=0)
