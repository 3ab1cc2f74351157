"""A DPO step in one pass: pairs of answers to the same conversation, at every turn of it.

    python examples/dpo_step.py

The chosen and the rejected answers of all turns form one tree, so the history is computed once
instead of twice a turn. docs/beyond-chat.md has the equations.
"""

import numpy as np
import torch
from comparison import changed_copy, compare, report, score_separately, small_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from flexmask import (
    PackedRow,
    Sample,
    build_tree,
    pack,
    patch,
    read_conversations,
    render_samples,
    token_logprobs,
)
from flexmask.demo import DATA_PATH, TOKENIZER_PATH

BETA, LEARNING_RATE = 0.1, 1e-3


def make_pairs(samples: list[Sample]) -> list[Sample]:
    """Each sample, chosen, and after it a rejected one: the same context, words out of order."""
    rng = np.random.default_rng(0)
    pairs = []
    for chosen in samples:
        ids = chosen.input_ids.copy()
        start = int(np.flatnonzero(chosen.loss_weights)[0])
        ids[start:-1] = rng.permutation(ids[start:-1])  # the stop token stays at the end
        pairs += [chosen, Sample(ids, chosen.loss_weights, (chosen.key, "rejected"))]
    return pairs


def score(model: nn.Module, row: PackedRow) -> list[Tensor]:
    """Log-probabilities of every sample's own tokens, in one pass: a list of tensors [n]."""
    batch = row.to_batch()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "subtree_end")}
    return row.gather(token_logprobs(model(**inputs).logits[0], row))


def dpo_loss(logprobs: list[Tensor], reference: list[Tensor], masks: list[Tensor]) -> Tensor:
    """The loss of a list of samples, chosen and rejected in turn; it knows of no trees.

    Args:
        logprobs: of the policy, one tensor [n] per sample.
        reference: of the reference.
        masks: 1 where a token belongs to the answer.
    """
    ratios = torch.stack(
        [
            ((new - anchor) * mask).sum()
            for new, anchor, mask in zip(logprobs, reference, masks, strict=True)
        ]
    )
    return -logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean()


def main() -> None:
    """Two updates, each compared with separate sequences."""
    model = patch(small_model())
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    chats = list(read_conversations(DATA_PATH))[10:11]
    groups = [make_pairs(render_samples(chat.messages, tokenizer)) for chat in chats]
    samples = [sample for group in groups for sample in group]
    masks = [torch.from_numpy(sample.loss_weights).float() for sample in samples]

    (row,) = pack([build_tree(group) for group in groups])
    with torch.no_grad():
        reference = score(changed_copy(model, 1e-2), row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for update in range(2):
        optimizer.zero_grad()
        loss = dpo_loss(score(model, row), reference, masks)
        loss.backward()
        separate = dpo_loss(score_separately(model, samples)[0], reference, masks)
        print(f"update {update}: loss {loss.item():.6f}")
        report(compare(model, loss, separate), [row])
        optimizer.step()


if __name__ == "__main__":
    main()
