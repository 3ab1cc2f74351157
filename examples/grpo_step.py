"""A GRPO step in one pass: groups of rollouts that share a prompt.

    python examples/grpo_step.py

Rollouts are sampled, rewarded and compared within their group; two updates are made from them. The
old and the reference policy, the policy and its entropy are each computed in one pass over a row
that holds every prompt once. docs/beyond-chat.md has the equations.
"""

import numpy as np
import torch
from comparison import changed_copy, compare, report, score_separately, small_model
from torch import Tensor, nn
from transformers import AutoTokenizer

from flexmask import (
    PackedRow,
    Sample,
    build_tree,
    pack,
    patch,
    read_conversations,
    token_logprobs_and_entropies,
)
from flexmask.demo import DATA_PATH, TOKENIZER_PATH

CLIP, KL_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.04, 0.01
GROUP_SIZE, NUM_NEW_TOKENS, LEARNING_RATE = 8, 24, 1e-3


def sample_group(model: nn.Module, prompt: list[int]) -> list[Sample]:
    """Rollouts from one prompt; the weights mark the tokens that the model has written."""
    sequences = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_return_sequences=GROUP_SIZE,
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=True,
    )
    stop = model.generation_config.eos_token_id
    samples = []
    for sequence in sequences.tolist():
        length = sequence.index(stop, len(prompt)) + 1 if stop in sequence[len(prompt) :] else None
        ids = np.array(sequence[:length])
        samples.append(Sample(ids, np.arange(ids.size) >= len(prompt)))
    return samples


def advantages_of(rewards: Tensor) -> Tensor:
    """Rewards [groups, rollouts] against those of the same group, flat."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def score(model: nn.Module, row: PackedRow) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of every rollout, in one pass: lists of tensors [n]."""
    batch = row.to_batch()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "subtree_end")}
    logprobs, entropies = token_logprobs_and_entropies(model(**inputs).logits[0], row)
    return row.gather(logprobs), row.gather(entropies)


def grpo_loss(
    logprobs: list[Tensor],
    entropies: list[Tensor],
    old: list[Tensor],
    reference: list[Tensor],
    masks: list[Tensor],
    advantages: Tensor,
) -> Tensor:
    """The loss of a list of rollouts, each a tensor [n] in every list; it knows of no trees.

    Args:
        logprobs: of the policy.
        entropies: of the policy.
        old: log-probabilities of the policy that wrote the rollouts.
        reference: log-probabilities of the policy that this one should stay near.
        masks: 1 where a token counts.
        advantages: [rollouts].
    """
    losses = []
    for new, before, anchor, mask, advantage in zip(
        logprobs, old, reference, masks, advantages, strict=True
    ):
        ratio = (new - before).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        kl = (anchor - new).exp() - (anchor - new) - 1
        losses.append(((KL_WEIGHT * kl - gain) * mask).sum() / mask.sum())
    entropy = (torch.cat(entropies) * torch.cat(masks)).sum() / torch.cat(masks).sum()
    return torch.stack(losses).mean() - ENTROPY_WEIGHT * entropy


def main() -> None:
    """Two updates from the same rollouts, each compared with separate sequences."""
    model = patch(small_model())
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    chats = list(read_conversations(DATA_PATH))[:3]
    prompts = [
        tokenizer.apply_chat_template(
            chat.messages[:2], add_generation_prompt=True, return_dict=False
        )
        for chat in chats
    ]
    groups = [sample_group(model, prompt) for prompt in prompts]
    samples = [sample for group in groups for sample in group]
    masks = [torch.from_numpy(sample.loss_weights).float() for sample in samples]
    rewards = torch.tensor([[float(len(set(s.input_ids))) for s in group] for group in groups])
    advantages = advantages_of(rewards)

    (row,) = pack([build_tree(group) for group in groups])
    with torch.no_grad():
        old, _ = score(model, row)
        reference, _ = score(changed_copy(model, 1e-2), row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for update in range(2):
        optimizer.zero_grad()
        loss = grpo_loss(*score(model, row), old, reference, masks, advantages)
        loss.backward()
        separate = grpo_loss(*score_separately(model, samples), old, reference, masks, advantages)
        print(f"update {update}: loss {loss.item():.6f}")
        report(compare(model, loss, separate), [row])
        optimizer.step()


if __name__ == "__main__":
    main()
