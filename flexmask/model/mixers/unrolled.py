"""Unrolled paths: what cannot take an initial state runs from root to leaf, as in N-pass.

Each path of the tree is gathered, run, and scattered back; a token that stands on several paths has
the same value on all of them, and takes it from one. Gradients flow back through the gather. The
cost is that of the path tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flexmask.model.mixers.plan import Plan, put_back, take


def run_paths(plan: Plan, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A causal map of sequences [n, l, C] -> [n, l, C'], on each path of rows [B, L, C]."""
    flat = [x.flatten(0, 1) for x in inputs]
    outputs = [forward(*(take(x, group.tokens) for x in flat)) for group in plan.paths.groups]
    return put_back(outputs, plan.paths).unflatten(0, tuple(inputs[0].shape[:2]))


def tree_selective_scan(
    plan: Plan,
    scan: Callable[..., Tensor],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The selective scan of Mamba over a tree, path by path: it takes no initial state.

    Args:
        plan: of the tree batch.
        scan: a selective scan of such arguments over each row.
        hidden_states: [B, C, L], as `dt` and the gate `z`.
        dt: step sizes.
        A: decay [C, N].
        B: [B, N, L].
        C: [B, N, L].
        D: skip connection [C] or None.
        z: gate or None.
        **options: of `scan`.

    Returns:
        [B, C, L].
    """

    def run(*rows: Tensor) -> Tensor:
        x, step, b, c, *gate = (row.mT for row in rows)
        return scan(x, step, A, b, c, D=D, z=gate[0] if gate else None, **options).mT

    inputs = [x.mT for x in (hidden_states, dt, B, C, z) if x is not None]
    return run_paths(plan, run, *inputs).mT
