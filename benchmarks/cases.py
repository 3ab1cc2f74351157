"""The cases there are, in the order of the report."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

CASES = {
    "exactness": "loss and gradients of whole models, single pass against N-pass",
    "rendering": "from messages to a tree of tokens",
    "layout": "orders of the packed row, by what the visited tiles waste",
    "packing": "rows under a token budget, and batches of equal cost",
    "mask": "building the BlockMask, against create_block_mask",
    "attention": "attention on a CPU, against SDPA, N-pass and FlexAttention",
    "shapes": "the same for kinds of conversations, agents among them",
    "step": "whole training steps of a 100M-parameter llama",
    "memory": "peak memory against the length of the row",
    "kernels": "the Triton kernels and varlen against what else runs on a GPU",
    "gpu_step": "whole training steps of 1.7B and 8B shapes on a GPU",
}
ON_GPU = ("kernels", "gpu_step")  # these run in steps, and say where they cannot


def load_case(name: str) -> ModuleType:
    """The module of a case: TITLE, ABOUT, measure, tables and draw."""
    return import_module(f"benchmarks.{name}")


def why_not(name: str, *, quick: bool) -> str | None:
    """The reason why this machine cannot run a case, or None."""
    if name not in ON_GPU:
        return None
    try:
        return load_case(name).why_not(quick=quick)
    except ModuleNotFoundError as missing:
        return f"needs the package {missing.name}"
