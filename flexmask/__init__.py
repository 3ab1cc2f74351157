"""Train on exactly what inference sees of a conversation, at the cost of its distinct tokens.

Nothing heavy is imported until a name is used: neither torch nor triton nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexmask.backends import attention as attention
    from flexmask.data.files import read_conversations as read_conversations
    from flexmask.data.messages import parse_conversation as parse_conversation
    from flexmask.data.prepare import prepare as prepare
    from flexmask.data.prepared import open_prepared as open_prepared
    from flexmask.data.renderer import render_samples as render_samples
    from flexmask.data.rows import to_dataset as to_dataset
    from flexmask.errors import FlexmaskError as FlexmaskError
    from flexmask.model import disabled as disabled
    from flexmask.model import is_patched as is_patched
    from flexmask.model import patch as patch
    from flexmask.model import unpatch as unpatch
    from flexmask.model.cost import CostModel as CostModel
    from flexmask.model.loss import token_logprobs as token_logprobs
    from flexmask.model.loss import token_logprobs_and_entropies as token_logprobs_and_entropies
    from flexmask.model.structure import unreached_parameters as unreached_parameters
    from flexmask.packing.collator import TreeCollator as TreeCollator
    from flexmask.packing.fitting import FittedTrees as FittedTrees
    from flexmask.packing.rows import PackedRow as PackedRow
    from flexmask.packing.rows import pack as pack
    from flexmask.packing.sampler import TreeBatchSampler as TreeBatchSampler
    from flexmask.training.checkpoints import ResumableTrainer as ResumableTrainer
    from flexmask.training.trainer import TreeTrainer as TreeTrainer
    from flexmask.tree.build import build_tree as build_tree
    from flexmask.tree.layout import packed_index as packed_index
    from flexmask.tree.mask import TreeMask as TreeMask
    from flexmask.tree.mask import compile_mask as compile_mask
    from flexmask.tree.sample import Sample as Sample
    from flexmask.tree.tree import PrefixTree as PrefixTree
    from flexmask.tree.tree import Segment as Segment

__version__ = "0.1.0"

_HOMES = {
    "CostModel": "flexmask.model.cost",
    "FittedTrees": "flexmask.packing.fitting",
    "FlexmaskError": "flexmask.errors",
    "PackedRow": "flexmask.packing.rows",
    "PrefixTree": "flexmask.tree.tree",
    "ResumableTrainer": "flexmask.training.checkpoints",
    "Sample": "flexmask.tree.sample",
    "Segment": "flexmask.tree.tree",
    "TreeBatchSampler": "flexmask.packing.sampler",
    "TreeCollator": "flexmask.packing.collator",
    "TreeMask": "flexmask.tree.mask",
    "TreeTrainer": "flexmask.training.trainer",
    "attention": "flexmask.backends",
    "build_tree": "flexmask.tree.build",
    "compile_mask": "flexmask.tree.mask",
    "disabled": "flexmask.model",
    "is_patched": "flexmask.model",
    "open_prepared": "flexmask.data.prepared",
    "pack": "flexmask.packing.rows",
    "packed_index": "flexmask.tree.layout",
    "parse_conversation": "flexmask.data.messages",
    "patch": "flexmask.model",
    "prepare": "flexmask.data.prepare",
    "read_conversations": "flexmask.data.files",
    "render_samples": "flexmask.data.renderer",
    "to_dataset": "flexmask.data.rows",
    "token_logprobs": "flexmask.model.loss",
    "token_logprobs_and_entropies": "flexmask.model.loss",
    "unpatch": "flexmask.model",
    "unreached_parameters": "flexmask.model.structure",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flexmask' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
