"""What a training step costs: floating point operations, linear in tokens but for attention.

For each token 6 operations a parameter of a linear layer (2 forward, 4 backward), for each visible
pair 12 a unit of width of the query heads (two products forward, four backward), for each position
6 a parameter of the head. Embeddings, norms, softmax, convolutions, recurrent scans, loss and
update count nothing. No constant is fitted: the predicted speed-up is a quotient of these sums, and
`flexmask plan --measure` puts measured steps beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmask.errors import UnsupportedModelError
from flexmask.model.checks import check_model
from flexmask.model.mixers.kinds import find_mixers
from flexmask.model.structure import (
    FOR_IMAGES,
    attention_layers,
    find_decoder,
    find_head,
    text_config,
)
from flexmask.model.windows import FULL, Window, layer_windows
from flexmask.model.work import Work, single_pass_work
from flexmask.tree.tree import PrefixTree

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NUM_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


@dataclass(frozen=True, slots=True)
class CostModel:
    """What one unit of work costs with a model.

    Attributes:
        linear: parameters of linear layers that one token meets; of experts, the active share.
        widths: heads times their width, the mean of keys and values, of the attention layers of
            each window together.
        num_layers: attention layers of each window.
        head: parameters of the output head, 0 without one.
    """

    linear: float
    widths: Mapping[Window, float]
    num_layers: Mapping[Window, int]
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> CostModel:
        """The cost of a model; one on the meta device will do.

        Raises:
            UnsupportedModelError: it cannot be patched, or does not say how many experts a token
                meets.
        """
        check_model(model, model)
        config, decoder = text_config(model), find_decoder(model)
        head = find_head(model)
        head_weights = () if head is None else head.parameters()
        widths: dict[Window, float] = {}
        windows = layer_windows(decoder)
        for layer, window in zip(attention_layers(decoder), windows, strict=True):
            widths[window] = widths.get(window, 0.0) + _width(layer, config)
        return cls(
            linear=_linear_parameters(decoder, config),
            widths=widths,
            num_layers=Counter(windows),
            head=sum(w.numel() for w in head_weights if w.ndim == 2),
        )

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows and chunks of the model, which its work has to be counted for."""
        return tuple(window for window in self.widths if window != FULL)

    @property
    def pairs_per_token(self) -> float:
        """Visible pairs that cost as much as the linear layers do for one token.

        Every layer counts as if it saw all of them: for trees of which only that number is known.
        """
        return 6 * (self.linear + self.head) / (12 * sum(self.widths.values()))

    def flops(self, work: Work) -> float:
        """Operations of forward and backward."""
        per_token = 6 * (self.linear + self.head)
        per_pair = (12 * width * work.pairs(window) for window, width in self.widths.items())
        return per_token * work.num_tokens + sum(per_pair)

    def tree_cost(self, tree: PrefixTree) -> float:
        """The operations of one pass over a tree, in tokens that see nothing."""
        return self.flops(single_pass_work(tree, self.windows)) / (6 * (self.linear + self.head))

    def speed_up(self, before: Work, after: Work) -> float:
        """How many times faster `after` is than `before`, at the same operations a second."""
        return self.flops(before) / self.flops(after)


def _width(layer: nn.Module, config: PreTrainedConfig) -> float:
    """The heads of an attention module times the mean width of their keys and values."""
    heads = getattr(layer, "num_heads", None) or config.num_attention_heads
    given = (getattr(layer, name, None) for name in ("qk_head_dim", "head_dim"))
    keys = next((width for width in given if width), None) or config.hidden_size // heads
    values = getattr(layer, "v_head_dim", None) or keys
    return heads * (keys + values) / 2


def _linear_parameters(decoder: PreTrainedModel, config: PreTrainedConfig) -> float:
    others = {
        id(module.weight)
        for module in decoder.modules()
        if isinstance(module, (nn.Embedding, nn.Conv1d))
    }
    in_mixers = {id(w) for mixer in find_mixers(decoder) for w in mixer.parameters()}
    total = 0.0
    for name, parameter in decoder.named_parameters():
        if parameter.ndim < 2 or id(parameter) in others or FOR_IMAGES in name:
            continue
        is_stack = parameter.ndim == 3 and id(parameter) not in in_mixers
        is_expert = is_stack or ".experts." in name
        total += parameter.numel() * (_active_share(config) if is_expert else 1.0)
    return total


def _active_share(config: Any) -> float:
    """The share of a mixture's experts that one token meets."""
    counts = [
        next((getattr(config, name) for name in names if getattr(config, name, None)), None)
        for names in (_NUM_ACTIVE, _NUM_EXPERTS)
    ]
    active, num_experts = (value[0] if isinstance(value, list) else value for value in counts)
    if active is None or num_experts is None:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r}: its config does not say how many experts a token "
            "meets; plan without --model"
        )
    return active / num_experts
