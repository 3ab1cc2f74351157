"""The same step without flexmask, and how far it is from the step in one pass."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM

from flexmask import PackedRow, Sample
from flexmask.demo import CONFIG_PATH


def small_model() -> nn.Module:
    """The demo's model with random weights, always the same."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG_PATH))


def changed_copy(model: nn.Module, scale: float) -> nn.Module:
    """A copy whose weights have moved a little: a reference, or the policy some steps ago."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn_like(parameter)
    return other


def score_separately(
    model: nn.Module, samples: Sequence[Sample]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of every sample, from a sequence of its own.

    Each is a list of tensors [n], in the samples' token order; nothing predicts the first token.
    """
    all_logprobs, all_entropies = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)
        table = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        logprobs = table.gather(-1, ids[1:, None])[:, 0]
        entropies = -(table.exp() * table).sum(-1)
        all_logprobs.append(pad(logprobs, (1, 0)))
        all_entropies.append(pad(entropies, (1, 0)))
    return all_logprobs, all_entropies


def compare(model: nn.Module, loss: Tensor, separate: Tensor) -> tuple[float, float]:
    """How far a loss, backpropagated already, is from that of separate sequences, relatively.

    Returns:
        The difference of the losses, and that of the gradients.
    """
    parameters = list(model.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(separate, parameters)])
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return (
        abs((loss - separate) / separate).item(),
        ((gradient - expected).norm() / expected.norm()).item(),
    )


def report(differences: tuple[float, float], rows: Sequence[PackedRow]) -> None:
    """Print what `compare` found, and how many tokens go through the model each way."""
    separate = sum(index.size for row in rows for index in row.sample_indices)
    together = sum(map(len, rows))
    print(
        f"relative difference: loss {differences[0]:.1e}, gradient {differences[1]:.1e}\n"
        f"tokens: {separate:,} in separate sequences, {together:,} in one pass, "
        f"{separate / together:.2f} times fewer"
    )
