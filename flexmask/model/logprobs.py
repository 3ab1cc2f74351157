"""Log-probabilities and entropies of many tokens, without a table of probabilities in memory.

With logits z [N, V] of N positions, log p = (z - max z) - log sum exp(z - max z):

    log-probability of token t after position n    log p[n, t]
    its gradient by z[n, v]                        [v = t] - p[n, v]
    entropy of position n                          H[n] = -sum_v p[n, v] log p[n, v]
    its gradient by z[n, v]                        -p[n, v] (log p[n, v] + H[n])

Autograd would keep an fp32 copy of the logits and another of log p. This keeps the logits, which
are there anyway, and three numbers a position, and goes through the rest a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexmask.tree.layout import IGNORE_INDEX

# logits looked at in one step: 64 MiB in fp32, on CPUs 16 MiB, nearer to what a cache holds
_CHUNK_ELEMENTS = 2**24
_CHUNK_ELEMENTS_ON_CPU = 2**22


def score_tokens(
    logits: Tensor, positions: Tensor, tokens: Tensor, *, with_entropies: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of `tokens` after `positions`, and entropies [N] by position.

    Computed in fp32, or fp64 if `logits` is; gradients come back in the dtype of `logits`.

    Args:
        logits: [N, V]; -inf is a token that cannot come.
        positions: int64 [M], in [0, N). A position may predict several tokens, each listed once.
        tokens: int64 [M], in [0, V), or -100: a log-probability of 0.
        with_entropies: compute the entropies; [0] without.
    """
    is_token = tokens != IGNORE_INDEX
    # other negative numbers would count from the end: V is out of bounds, which raises
    index = tokens.where(is_token, 0)
    index = index.where(index >= 0, logits.shape[1])
    if torch.compiler.is_compiling():  # the compiler fuses the formula, and unrolls chunks
        logprobs, entropies = _by_formula(logits, positions, index, with_entropies)
    else:
        logprobs, entropies = _Scores.apply(logits, positions, index, with_entropies)
    return logprobs.where(is_token, 0), entropies


@torch.no_grad()
def count_predictions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many targets are the likeliest token, int64 [], and the entropy summed over targets [].

    Args:
        logits: [B, L, V].
        targets: int64 [B, L], -100 where there is none.
    """
    flat, targets = logits.flatten(0, -2), targets.flatten()
    positions = torch.arange(len(flat), device=flat.device)
    _, entropies = score_tokens(flat, positions, targets, with_entropies=True)
    is_right = flat.argmax(-1) == targets
    return is_right.sum(), entropies.where(targets != IGNORE_INDEX, 0).sum()


def _by_formula(
    logits: Tensor, positions: Tensor, tokens: Tensor, with_entropies: bool
) -> tuple[Tensor, Tensor]:
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    entropies = torch.special.entr(logp.exp()).sum(-1) if with_entropies else logp.new_zeros(0)
    return logp[positions, tokens], entropies


class _Scores(torch.autograd.Function):
    """Saves logits, and for each position their maximum, the log of the sum, and the entropy."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, positions: Tensor, tokens: Tensor, with_entropies: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        highest, log_sum = logits.new_empty(2, logits.shape[0], dtype=dtype)
        entropies = logits.new_empty(logits.shape[0] if with_entropies else 0, dtype=dtype)
        for chunk in _chunks(logits):
            z = logits[chunk].to(dtype)
            logp = z.log_softmax(-1)
            highest[chunk] = z.amax(-1)
            log_sum[chunk] = -logp.amax(-1)  # of the likeliest token, log p = 0 - log sum
            if with_entropies:
                entropies[chunk] = torch.special.entr(logp.exp_()).sum(-1)  # 0 log 0 = 0
        chosen = logits[positions, tokens].to(dtype)
        ctx.save_for_backward(logits, positions, tokens, highest, log_sum, entropies)
        ctx.set_materialize_grads(False)
        return (chosen - highest[positions]) - log_sum[positions], entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, positions, tokens, highest, log_sum, entropies = ctx.saved_tensors
        total = torch.zeros_like(highest)
        if dlogprobs is not None:
            total.index_add_(0, positions, dlogprobs)

        def part(z: Tensor, at: slice | Tensor) -> Tensor:
            """What sums over the vocabulary contribute to logits `z` [n, k] of positions `at`."""
            p = (z.to(highest) - highest[at, None]).sub_(log_sum[at, None]).exp_()
            if dentropies is None:
                return p.mul_(-total[at, None])
            slope = torch.special.entr(p).addcmul_(p, entropies[at, None], value=-1)
            return slope.mul_(dentropies[at, None]).addcmul_(p, total[at, None], value=-1)

        gradient = torch.empty_like(logits)
        for chunk in _chunks(logits):
            gradient[chunk] = part(logits[chunk], chunk)
        if dlogprobs is not None:  # summed before it is rounded: 1 - p may be small
            chosen = part(logits[positions, tokens][:, None], positions)[:, 0]
            gradient[positions, tokens] = (dlogprobs + chosen).to(gradient)
        return gradient, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Ranges of positions that are looked at in one step, at least one each."""
    is_on_cpu = logits.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_ON_CPU if is_on_cpu else _CHUNK_ELEMENTS
    size = max(1, elements // logits.shape[1])
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))
