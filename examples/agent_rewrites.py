"""A policy-gradient step on an agent whose history is rewritten, in one pass.

    python examples/agent_rewrites.py

After each step the thinking is dropped, and of old tool results only a stub stays. So a step's
context is not the beginning of the next one, and training on it as one sequence would train on
contexts that the agent never saw. The tree shares what two steps really have in common, and each
step keeps the context that it had. docs/beyond-chat.md has the equations.
"""

import numpy as np
import torch
from comparison import compare, report, score_separately, small_model
from torch import Tensor, nn

from flexmask import (
    PackedRow,
    Sample,
    build_tree,
    pack,
    patch,
    token_logprobs,
)

NUM_STEPS, KEPT_RESULTS, VOCABULARY, DISCOUNT = 10, 3, 1700, 0.95
CLEARED = [7, 7]  # what stands in place of an old tool result


def run_agent(seed: int) -> list[Sample]:
    """The steps of one trajectory; the weights mark the thinking and the call of each step."""
    rng = np.random.default_rng(seed)

    def write(length: int) -> list[int]:
        return rng.integers(10, VOCABULARY, length).tolist()

    task, calls, results, steps = write(60), [], [], []
    for step in range(NUM_STEPS):
        context = list(task)
        for number, (call, result) in enumerate(zip(calls, results, strict=True)):
            context += call + (result if number >= step - KEPT_RESULTS else CLEARED)
        thinking, call = write(40), write(15)
        ids = np.array(context + thinking + call)
        steps.append(Sample(ids, np.arange(ids.size) >= len(context), (seed, step)))
        calls.append(call)
        results.append(write(30))
    return steps


def advantages_of(outcome: float) -> list[float]:
    """What each step of a trajectory is worth: its outcome, less the further away it is."""
    return [outcome * DISCOUNT ** (NUM_STEPS - 1 - step) for step in range(NUM_STEPS)]


def one_pass_loss(model: nn.Module, row: PackedRow, weights: list[np.ndarray]) -> Tensor:
    """Minus the weighted log-probabilities, per trained token: linear, so one product does it."""
    batch = row.to_batch()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "subtree_end")}
    logprobs = token_logprobs(model(**inputs).logits[0], row)
    summed = torch.from_numpy(row.scatter(weights)).to(logprobs)
    return -(summed * logprobs).sum() / sum(np.count_nonzero(w) for w in weights)


def separate_loss(model: nn.Module, samples: list[Sample], weights: list[np.ndarray]) -> Tensor:
    """The same from sequences of their own."""
    logprobs, _ = score_separately(model, samples)
    pairs = zip(weights, logprobs, strict=True)
    total = torch.stack([(torch.from_numpy(w).to(x) * x).sum() for w, x in pairs]).sum()
    return -total / sum(np.count_nonzero(w) for w in weights)


def main() -> None:
    """One step on two trajectories, compared with separate sequences."""
    model = patch(small_model())
    runs = [run_agent(seed) for seed in (0, 1)]
    steps = [step for run in runs for step in run]
    advantages = [value for outcome in (1.0, -0.5) for value in advantages_of(outcome)]
    weights = [a * step.loss_weights for a, step in zip(advantages, steps, strict=True)]

    (row,) = pack([build_tree(run) for run in runs])
    loss = one_pass_loss(model, row, weights)
    loss.backward()
    print(f"loss {loss.item():.6f}")
    report(compare(model, loss, separate_loss(model, steps, weights)), [row])


if __name__ == "__main__":
    main()
