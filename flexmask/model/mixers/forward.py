"""The forward pass of a recurrent or convolutional layer of a patched model.

On a tree batch the layer's own forward runs once over the packed row, with its projections, gates
and norms; only the functions by which it looks along the sequence are replaced, by ones that follow
the tree. The replacement is in the names that this one call sees, so nothing is shared between
calls. Where transformers writes those functions out inside the layer (before 5.17), or another
library has replaced its forward, the whole layer runs on unrolled paths instead.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from flexmask.errors import UnsupportedModelError
from flexmask.model.mixers.convolution import tree_convolution
from flexmask.model.mixers.layers import tree_compressed_projection, tree_lightning_attention
from flexmask.model.mixers.plan import Plan, plan_of
from flexmask.model.mixers.recurrence import tree_chunk_scan, tree_gated_delta_rule
from flexmask.model.mixers.unrolled import run_paths, tree_selective_scan
from flexmask.model.tree_attention import is_tree

# Functions of transformers that look along the sequence -> the same over a tree.
OVER_A_TREE: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": tree_convolution,
    "torch_chunk_gated_delta_rule": tree_gated_delta_rule,
    "chunk_kimi_delta_attention": tree_gated_delta_rule,
    "mamba2_chunk_scan": tree_chunk_scan,
    "mamba_selective_scan": tree_selective_scan,
}
# Layers that write out how they look along the sequence -> the same layer over a tree.
LAYERS_OVER_A_TREE: dict[str, Callable[[Any, Plan, Tensor], tuple[Tensor | None, ...]]] = {
    "MiniMaxLightningAttention": tree_lightning_attention,
    "ZayaCCAProjection": tree_compressed_projection,
}
# A shortcut through several of them, which answers None where it does not apply.
_SHORTCUT = "mamba2_split_conv1d_scan_combined"


class MixerForward:
    """Stands for the forward pass of one layer, which it keeps for ordinary batches.

    Attributes:
        mixer: the layer.
        functions: names of what the layer calls to look along the sequence.
        tree_layer: what stands for a layer that calls nothing of the kind, or None.
        replaced: what another library has put in place of the layer's forward, or None.
        is_unrolled: whether the whole layer runs on unrolled paths.
        was_called: whether a tree mask has come by since the forward pass began.
    """

    def __init__(self, mixer: nn.Module, functions: tuple[str, ...]) -> None:
        self.mixer = mixer
        self.functions = functions
        self.replaced: Callable[..., Any] | None = mixer.__dict__.get("forward")
        own = inspect.unwrap(type(mixer).forward)
        self.tree_layer = LAYERS_OVER_A_TREE.get(type(mixer).__name__)
        if self.tree_layer and self.replaced is not None:
            raise UnsupportedModelError(
                f"{type(mixer).__name__} has a forward of another library; it cannot be patched"
            )
        self.is_unrolled = self.replaced is not None or not set(functions) <= _called_by(own)
        self.was_called = False

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, which is its output [B, L, C] for most."""
        mask = next(filter(is_tree, (*args, *kwargs.values())), None)
        if mask is None:
            return self._stock(hidden_states, *args, **kwargs)
        self.was_called = True
        if self.tree_layer:
            return self._layer_on_a_tree(hidden_states, mask.to(hidden_states.device))
        kwargs["attention_mask"] = None
        if args:
            raise UnsupportedModelError(
                f"{type(self.mixer).__name__} was given more than hidden_states by position"
            )
        return self._on_a_tree(hidden_states, mask.to(hidden_states.device), kwargs)

    @torch.compiler.disable
    def _on_a_tree(self, hidden_states: Tensor, mask: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        plan = plan_of(mask)
        if self.is_unrolled:
            return run_paths(plan, partial(self._stock, **kwargs), hidden_states)
        own = inspect.unwrap(type(self.mixer).forward)
        called: set[str] = set()
        names: dict[str, Callable[..., Any]] = {_SHORTCUT: _no_shortcut}
        for name in self.functions:
            names[name] = partial(_run, called, name, plan, own.__globals__[name])
        output = _with_names(own, names)(self.mixer, hidden_states, **kwargs)
        if missing := set(self.functions) - called:
            raise UnsupportedModelError(
                f"{type(self.mixer).__name__} did not call {', '.join(sorted(missing))}; it would "
                "run past the ends of the branches"
            )
        return output

    @torch.compiler.disable
    def _layer_on_a_tree(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor | None, ...]:
        assert self.tree_layer is not None
        return self.tree_layer(self.mixer, plan_of(mask), hidden_states)

    def _stock(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(hidden_states, *args, **kwargs)
        return type(self.mixer).forward(self.mixer, hidden_states, *args, **kwargs)


def _run(
    called: set[str], name: str, plan: Plan, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call the tree version of a function by name, and note that it was called."""
    for option in ("cu_seqlens", "seq_idx", "initial_state", "initial_states"):
        if kwargs.get(option) is not None:
            raise UnsupportedModelError(f"{name} with {option} is not exact on a tree")
    called.add(name)
    return OVER_A_TREE[name](plan, original, *args, **kwargs)


def _no_shortcut(*_: Any, **__: Any) -> None:
    """No fused kernel knows trees."""


def _called_by(function: Callable[..., Any]) -> set[str]:
    """The global names that a function loads."""
    return {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}


def _with_names(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """The same code with some of the global names that it sees bound to something else."""
    twin = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
