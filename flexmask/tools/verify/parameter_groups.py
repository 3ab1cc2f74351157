"""Which part of a model a parameter belongs to: embedding, attention, mlp, norm, head, other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from flexmask.model.structure import find_decoder, find_head, find_model

GROUPS = ("embedding", "attention", "mlp", "norm", "head", "other")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Where a parameter is.

    Attributes:
        kind: one of GROUPS; a head that shares its weights with the embedding counts as that.
        layer: number of the layer, None outside of them.
    """

    kind: str
    layer: int | None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind} of layer {self.layer}"


def parameter_groups(model: nn.Module) -> dict[str, ParameterGroup]:
    """The group of each trainable parameter, by name, in the model's order."""
    top = find_model(model)
    head = find_head(top)
    in_decoder = {id(parameter) for parameter in find_decoder(top).parameters()}
    modules = dict(model.named_modules())
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        paths = accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}")
        owners = [modules[path] for path in paths]  # the outermost first
        layer = _LAYER.search(name)
        kind = "head" if owners[-1] is head else _kind(owners, is_layer=layer is not None)
        if id(parameter) not in in_decoder and kind not in ("embedding", "head"):
            kind = "other"
        groups[name] = ParameterGroup(kind, int(layer[1]) if layer else None)
    return groups


def _kind(owners: list[nn.Module], *, is_layer: bool) -> str:
    if isinstance(owners[-1], nn.Embedding):
        return "embedding"
    if "Norm" in type(owners[-1]).__name__:
        return "norm"
    if any(type(owner).__name__.endswith("Attention") for owner in owners):
        return "attention"
    return "mlp" if is_layer else "other"
