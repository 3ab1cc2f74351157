"""Attention of one conversation, run in every way that is compared, and checked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.precise import attend_precisely
from benchmarks.record import Measurement
from flexmask import PrefixTree, Segment, TreeMask, attention, compile_mask
from flexmask.packing.rows import sample_indices
from flexmask.tree.layout import lay_out
from flexmask.tree.oracle import ancestry

TOLERANCE = torch.finfo(torch.float32).eps  # for the last rounding of each result
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")

Results = tuple[Tensor, ...]  # out, dq, dk, dv; all [1, H, L, D]


class Inputs(NamedTuple):
    """Leaves q, k, v and the gradient of the output, all [1, H, L, D], as models lay them out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def at(self, index: Tensor, is_owned: Tensor) -> Inputs:
        """The tokens `index` as leaves of their own; dout only where `is_owned`, bool [n]."""
        q, k, v, dout = (x.detach().transpose(1, 2)[:, index].transpose(1, 2) for x in self)
        return _leaves(q, k, v, dout * is_owned.unsqueeze(-1))


def _leaves(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Inputs:
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


class Case(NamedTuple):
    """A conversation's mask, its samples' packed positions, and random inputs."""

    tree: PrefixTree
    mask: TreeMask
    dense: Tensor
    samples: list[Tensor]
    inputs: Inputs


class Checked(NamedTuple):
    """What `check_case` found right: results on all heads, and fp64 results of the first head.

    `dense_errors` are those of dense SDPA against fp64; every bound is a multiple of them.
    """

    ours: Results
    dense: Results
    precise: Results  # [1, 1, L, D], fp64
    dense_errors: list[float]


def make_case(tree: PrefixTree, num_heads: int, width: int) -> Case:
    """The case of `tree`, one sample per leaf, with the same random inputs every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, tree.num_tokens, num_heads, width)
    q, k, v, dout = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4))
    inputs = _leaves(q, k, v, dout)
    samples = [torch.from_numpy(index) for index in sample_indices(tree, lay_out(tree), 0)]
    return Case(tree, compile_mask(tree), torch.from_numpy(ancestry(tree)), samples, inputs)


def _run(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Results:
    """Output and gradients of one attention call."""
    for x in (inputs.q, inputs.k, inputs.v):
        x.grad = None
    out = attend(inputs.q, inputs.k, inputs.v)
    out.backward(inputs.dout)
    gradients = (x.grad for x in (inputs.q, inputs.k, inputs.v))
    return out.detach(), *(grad for grad in gradients if grad is not None)


def run_cpu(inputs: Inputs, mask: TreeMask) -> Results:
    """The backend that is measured."""
    return _run(inputs, lambda q, k, v: attention(q, k, v, mask, backend="cpu"))


def run_dense(inputs: Inputs, dense: Tensor) -> Results:
    """SDPA with a mask [L, L], boolean or added."""
    return _run(
        inputs, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense[None, None])
    )


def run_causal(inputs: Inputs) -> Results:
    """SDPA, plain causal."""
    return _run(inputs, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True))


def npass_inputs(case: Case) -> list[Inputs]:
    """The samples' inputs; a token that several samples hold has its gradient in the first."""
    owned = owned_tokens(case.samples, case.tree.num_tokens)
    return [case.inputs.at(*pair) for pair in zip(case.samples, owned, strict=True)]


def owned_tokens(samples: list[Tensor], num_tokens: int) -> list[Tensor]:
    """For each sample, given by the places of its tokens, which no sample before it holds."""
    is_held = torch.zeros(num_tokens, dtype=torch.bool)
    owned = []
    for index in samples:
        owned.append(~is_held[index])
        is_held[index] = True
    return owned


def run_npass(samples: list[Inputs]) -> list[Results]:
    """Each sample causal, one call each."""
    return [run_causal(sample) for sample in samples]


def pack_npass(case: Case, samples: list[Inputs]) -> tuple[Inputs, TreeMask]:
    """The samples end to end in one row, each a tree of its own."""
    q, k, v, dout = (
        torch.cat([x.detach().transpose(1, 2) for x in column], 1).transpose(1, 2)
        for column in zip(*samples, strict=True)
    )
    chains = [PrefixTree.from_segments([Segment(index.numel())]) for index in case.samples]
    return _leaves(q, k, v, dout), compile_mask(chains)


def check_case(case: Case, label: str, measurement: Measurement) -> Checked:
    """Compare the `cpu` backend with fp64, dense SDPA, N-pass and packed N-pass.

    Raises:
        CheckFailedError: a result that is further off than dense SDPA's own error allows.
    """
    ours, dense = run_cpu(case.inputs, case.mask), run_dense(case.inputs, case.dense)
    precise = _precise_first_head(case)
    samples = npass_inputs(case)
    npass = joined(case, run_npass(samples))
    packed_row, packed_mask = pack_npass(case, samples)
    lengths = [index.numel() for index in case.samples]
    split = (torch.split(x, lengths, dim=2) for x in run_cpu(packed_row, packed_mask))
    packed = joined(case, list(zip(*split, strict=True)))
    dense_errors = [error(a[0, :1], b[0]) for a, b in zip(dense, precise, strict=True)]
    for i, name in enumerate(NAMES):
        where = f"{name}, {label}"
        own_error = error(ours[i][0, :1], precise[i][0])
        measurement.check(f"{where}, against fp64", own_error, own_bound(dense_errors[i]))
        bound = joint_bound(dense_errors[i])
        measurement.check(f"{where}, against dense SDPA", error(ours[i][0], dense[i][0]), bound)
        measurement.check(f"{where}, against N-pass", error(ours[i][0], npass[i][0]), bound)
        measurement.check(f"{where}, packed N-pass", error(packed[i][0], npass[i][0]), bound)
    return Checked(ours, dense, precise, dense_errors)


def own_bound(dense_error: float) -> float:
    """How far from fp64 a result may be: twice as far as that of dense SDPA."""
    return 2 * dense_error + TOLERANCE


def joint_bound(dense_error: float) -> float:
    """How far apart two fp32 results may be: the sum of both errors."""
    return 3 * dense_error + TOLERANCE


def _precise_first_head(case: Case) -> Results:
    q, k, v, dout = (x[0, 0].detach() for x in case.inputs)
    return tuple(x[None, None] for x in attend_precisely(q, k, v, dout, case.dense.__getitem__))


def error(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of a head: norm(a - b) / norm(b) over tokens and width."""
    difference = torch.linalg.vector_norm(a.double() - b.double(), dim=(1, 2))
    return float((difference / torch.linalg.vector_norm(b.double(), dim=(1, 2))).max())


def joined(case: Case, results: list[Results]) -> Results:
    """N-pass results as of one row: outputs are the same in every sample, gradients add up."""
    out, *gradients = (torch.zeros_like(case.inputs.q.detach()) for _ in range(4))
    for index, (sample_out, *sample_gradients) in zip(case.samples, results, strict=True):
        out[:, :, index] = sample_out
        for total, part in zip(gradients, sample_gradients, strict=True):
            total[:, :, index] += part
    return out, *gradients
