"""A causal convolution along every path of a tree, in one call.

A convolution of width k looks at a token and the k - 1 before it. All chains are laid end to end,
each after copies of the k - 1 tokens that precede its head on its path (zeros where a path begins):

    trunk  a b c d e f          d hangs from c, x from b
    branch x y                  0 0 a b c d e f | a b x y      (k = 3)

Chains are few and k is about 4, so this is the cost of each token once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flexmask.model.mixers.plan import Plan


def tree_convolution(
    plan: Plan,
    convolve: Callable[..., Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """`convolve` along the paths of a tree.

    Args:
        plan: of the tree batch.
        convolve: a causal convolution of such arguments over each row.
        hidden_states: [B, C, L].
        weight: [C, k].
        bias: [C] or None.
        activation: what is applied to the outcome.

    Returns:
        [B, C, L].
    """
    tokens, absent, places = plan.chains(weight.shape[-1] - 1)
    rows = hidden_states.transpose(1, 2)  # [B, L, C]
    chains = rows.flatten(0, 1).index_select(0, tokens).index_fill(0, absent, 0)
    output = convolve(chains.t()[None], weight, bias, activation=activation)
    return output[0].t().index_select(0, places).view(rows.shape[0], rows.shape[1], -1).mT
