"""Peak memory of a process that shares a row of 16,384 tokens with others: one step on the CPU.

`torchrun --nproc-per-node N -m benchmarks.sequence_memory [--gradient_checkpointing]`, for N of 1,
2 and 4, prints the figures of docs/scaling.md. The loss has to be the same for each N.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, distributed

from benchmarks.conversations import TURN, random_samples, scaled_turns
from benchmarks.models import SMALL, random_llama
from flexmask import build_tree, pack, patch
from flexmask.packing.rows import stack_rows
from flexmask.tools.peak import peak_bytes, reset_peak

LENGTH = 16_384


def main() -> None:
    """Run a step, and print what the first process held."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    size = distributed.get_world_size()
    model = patch(random_llama(SMALL).train(), sequence_group=distributed.group.WORLD)
    if "--gradient_checkpointing" in sys.argv:
        model.gradient_checkpointing_enable()
    model(**shared_row([TURN], size)).loss.backward()  # gradients and libraries are there now
    batch = shared_row(scaled_turns(LENGTH), size)
    distributed.barrier()
    before = reset_peak()
    loss = model(**batch).loss
    forward = peak_bytes() - before
    loss.backward()
    if distributed.get_rank() == 0:
        print(
            f"{size} processes, loss {loss.item():.6f}: {forward / 2**20:,.0f} MiB after the "
            f"forward pass, {(peak_bytes() - before) / 2**20:,.0f} MiB in all"
        )
    distributed.barrier()
    distributed.destroy_process_group()


def shared_row(turns: list[tuple[int, int, int]], size: int) -> dict[str, Tensor]:
    """One conversation as a batch that so many processes can share."""
    samples = random_samples(turns, vocab_size=SMALL.vocab_size, seed=0)
    return stack_rows(pack([build_tree(samples)]), pad_to_multiple_of=2 * size)


if __name__ == "__main__":
    main()
