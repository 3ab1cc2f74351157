"""Which part of a model a parameter belongs to: embedding, attention, mlp, norm, head, other."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    decoder = find_decoder(top)
    modules = dict(model.named_modules())
    in_decoder = {id(parameter) for parameter in decoder.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.rpartition(".")[0]
        owners = [modules[path[:end]] for end in _ends(path)]
        layer = _LAYER.search(name)
        kind = _kind(owners, is_head=owners[-1] is head, is_layer=layer is not None)
        if id(parameter) not in in_decoder and kind not in ("embedding", "head"):
            kind = "other"
        groups[name] = ParameterGroup(kind, int(layer[1]) if layer else None)
    return groups


def _ends(path: str) -> list[int]:
    """Where the names of a module's owners end in its path, the outermost first."""
    return [*(match.start() for match in re.finditer(r"\.", path)), len(path)]


def _kind(owners: list[nn.Module], *, is_head: bool, is_layer: bool) -> str:
    own = type(owners[-1]).__name__
    if isinstance(owners[-1], nn.Embedding):
        return "embedding"
    if is_head:
        return "head"
    if "Norm" in own:
        return "norm"
    if any(type(owner).__name__.endswith("Attention") for owner in owners):
        return "attention"
    return "mlp" if is_layer else "other"
