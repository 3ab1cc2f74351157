"""Recurrent scans over a tree: every token once, with states handed on where branches leave.

Inner pieces run level by level; the state at a piece's tail is the initial state of every piece
below it. All leaves run last, in a few batches. Where a run is shorter than others of its batch it
is padded with tokens that leave the state as it is, so a final state is that of the run.

The scans are those of transformers, on whatever kernels it has chosen: they take an initial state,
give back the final one, and pass gradients through both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexmask.model.mixers.plan import Plan, put_back, take

Scan = Callable[..., Any]


def run_pieces(
    plan: Plan,
    inputs: Sequence[Tensor],
    gates: Sequence[Tensor],
    scan: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """The outputs [B, L, ...] of a recurrence along all paths of a tree.

    Args:
        plan: of the tree batch.
        inputs: [B, L, ...] each.
        gates: the same, with values that leave the state as it is where they are 0.
        scan: takes initial states [n, ...] (None for zeros), inputs and gates [n, l, ...]; returns
            outputs [n, l, ...] and final states [n, ...].
    """
    above = plan.forest.piece_parents
    states: dict[int, Tensor] = {}
    outputs = []
    for tokens, is_token, members in plan.pieces.groups:
        initial = None
        if above[members[0]] >= 0:
            initial = torch.stack([states[above[member]] for member in members])
        pieces = [take(x.flatten(0, 1), tokens) for x in inputs]
        pieces += [_zero_padding(take(x.flatten(0, 1), tokens), is_token) for x in gates]
        output, final = scan(initial, *pieces)
        outputs.append(output)
        states.update(zip(members, final.unbind(0), strict=True))
    return put_back(outputs, plan.pieces).unflatten(0, tuple(inputs[0].shape[:2]))


def tree_gated_delta_rule(
    plan: Plan,
    scan: Scan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule over a tree; all arguments [B, L, H, ...], as `scan` takes them.

    The decay `g` is one a head, or one a channel as in Kimi Delta Attention.
    A token with beta = 0 writes nothing and one with g = 0 forgets nothing: that is padding.
    """

    def run(initial: Tensor | None, *pieces: Tensor) -> Any:
        q, k, v, g, beta = pieces
        return scan(
            q,
            k,
            v,
            g=g,
            beta=beta,
            chunk_size=_chunk_size(q, 64),
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )

    return run_pieces(plan, (query, key, value), (g, beta), run), None


def tree_chunk_scan(
    plan: Plan,
    scan: Scan,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """The state space duality of Mamba-2 over a tree; arguments [B, L, ...], as `scan` takes them.

    A token with dt = 0 neither writes nor decays: that is padding. So the step sizes are worked out
    here (`scan` would lift them to the lower limit again), in fp32 as its kernel does.
    """
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)

    def run(initial: Tensor | None, x: Tensor, b: Tensor, c: Tensor, steps: Tensor) -> Any:
        return scan(
            x,
            steps,
            A,
            b,
            c,
            chunk_size=_chunk_size(x, chunk_size),
            D=D,
            initial_states=initial,
            return_final_states=True,
        )

    return run_pieces(plan, (hidden_states, B, C), (dt,), run)


def _zero_padding(gate: Tensor, is_token: Tensor | None) -> Tensor:
    """`gate` [n, l, ...] with 0 where a run has ended."""
    if is_token is None:
        return gate
    return gate.masked_fill(~is_token.view(*is_token.shape, *[1] * (gate.ndim - 2)), 0)


def _chunk_size(rows: Tensor, largest: int) -> int:
    """The chunk for rows [n, l, ...]: on a CPU, scans pad short rows to a whole chunk."""
    if rows.device.type != "cpu":
        return largest
    return min(largest, max(16, 1 << (rows.shape[1] - 1).bit_length()))
