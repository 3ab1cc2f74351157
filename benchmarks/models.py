"""Random llamas from a config, and one optimizer step's loss and gradients in every way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from flexmask import PackedRow, Sample, build_tree
from flexmask.model.npass import npass_batches
from flexmask.tree.layout import IGNORE_INDEX
from flexmask.tree.oracle import ancestry

Batch = dict[str, Tensor]

SMALL = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=704,
    max_position_embeddings=65_536,
)
TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    max_position_embeddings=4096,
)


def random_llama(config: LlamaConfig, *, seed: int = 0) -> LlamaForCausalLM:
    """A llama in fp32 with stock sdpa, its weights large enough for attention to matter."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model.train()


def describe_model(model: LlamaForCausalLM) -> dict[str, Any]:
    """What a reader needs to know of a random llama, as settings of a case."""
    return {
        "model": "llama",
        "num_parameters": model.num_parameters(),
        "num_layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
    }


def in_fp64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model`, converted to fp64 everywhere: stock transformers keeps norms and rope in fp32.

    Softmax is fp64 already in sdpa; the loss of such a model is up to the caller.
    """
    model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif isinstance(child, LlamaRotaryEmbedding):
                setattr(module, name, _Rotary(model.config))
    return model


class _Rotary(nn.Module):
    """Rotary embedding in fp64 (Su et al., arXiv 2104.09864)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        parameters: Any = config.rope_parameters
        self.frequencies = parameters["rope_theta"] ** -exponents

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.double().unsqueeze(-1) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def single_pass_batches(conversations: Iterable[Sequence[Sample]]) -> list[Batch]:
    """One batch: the trees of all conversations in one row."""
    return [PackedRow.from_trees([build_tree(samples) for samples in conversations]).to_batch()]


def npass_step_batches(conversations: Iterable[Sequence[Sample]]) -> list[Batch]:
    """One batch per sample, for an unpatched model."""
    return [batch for samples in conversations for batch in npass_batches(samples)]


def packed_npass_batches(conversations: Iterable[Sequence[Sample]]) -> list[Batch]:
    """One batch: all samples end to end in a row, each a tree of its own."""
    trees = [build_tree([sample]) for samples in conversations for sample in samples]
    return [PackedRow.from_trees(trees).to_batch()]


def dense_batches(conversations: Iterable[Sequence[Sample]]) -> list[Batch]:
    """The single-pass batch of each conversation, with a dense mask for an unpatched model.

    The mask is fp32 [1, 1, L, L], 0 and -inf: what sdpa would make of a boolean one.
    """
    batches = []
    for samples in conversations:
        tree = build_tree(samples)
        batch = PackedRow.from_trees([tree]).to_batch()
        del batch["subtree_end"]
        hidden = torch.from_numpy(~ancestry(tree))
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        batches.append(batch | {"attention_mask": mask[None, None]})
    return batches


def count_trained(batches: Iterable[Batch]) -> int:
    """How many positions predict a trained token."""
    return sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in batches)


def run_step(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over the trained tokens of all batches; gradients add up in the model."""
    num_trained = count_trained(batches)
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch, num_trained)
        loss.backward()
        total += float(loss.detach())
    return total


def loss_of(model: nn.Module, batch: Batch, num_trained: int) -> Tensor:
    """The model's own loss, or in fp64, where that would cast to fp32, the same in fp64."""
    if next(model.parameters()).dtype != torch.float64:
        return model(**batch, num_items_in_batch=num_trained).loss
    inputs = {name: x for name, x in batch.items() if "label" not in name}
    logits = model(**inputs).logits.flatten(0, 1)
    labels = batch["shift_labels"].flatten()
    losses = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return losses / num_trained


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, by name; the model is left without any."""
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return gradients


def gradient_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Any]:
    """How far the gradients `a` are from `b`, for the parameter where they are furthest.

    Returns:
        `largest`: largest difference / largest entry of b; `norm`: norm of the difference / norm
        of b; each the worst of all parameters, with its name in `largest_at` and `norm_at`.
    """
    if a.keys() != b.keys():
        raise AssertionError(f"gradients of different parameters: {a.keys() ^ b.keys()}")
    largest, norm = {}, {}
    for name, reference in b.items():
        difference = (a[name].double() - reference.double()).flatten()
        expected = reference.double().flatten()
        largest[name] = float(difference.abs().max() / expected.abs().max())
        norm[name] = float(difference.norm() / expected.norm())
    return {
        "largest": max(largest.values()),
        "largest_at": max(largest, key=largest.__getitem__),
        "norm": max(norm.values()),
        "norm_at": max(norm, key=norm.__getitem__),
    }
