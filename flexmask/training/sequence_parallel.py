"""Processes of a run that share the tokens of a row: which, and that they are dealt the same rows.

DDP and FSDP need not know of them: gradients are averaged over all processes. None of accelerate's
own dimensions for rows that are cut would do: "cp" and "sp" bring an attention of their own, and
FSDP does not reduce gradients over "tp" and "sp".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexmask.errors import DataError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from flexmask.model.sequence_group import SequenceGroup


def check_size(training: TrainingArguments, size: int) -> None:
    """Raise FlexmaskError unless so many processes of a run can share each row.

    Args:
        training: the Trainer's options.
        size: how many, n; `--sequence_parallel_size`.
    """
    if training.world_size % size:
        raise DataError(
            f"--sequence_parallel_size must divide the number of processes, {training.world_size}, "
            f"got {size}; start a multiple of {size} with torchrun"
        )
    if size > 1 and training.use_liger_kernel:
        raise UnsupportedModelError(
            "--use_liger_kernel computes a loss of its own, of a part of the row; leave it out, or "
            "--sequence_parallel_size"
        )


def pad_for_shards(size: int) -> int:
    """What rows are padded to a multiple of, to be cut over `size` processes."""
    return 2 * size if size > 1 else 1


def make_group(training: TrainingArguments, size: int) -> Any:
    """The process group that shares rows with this process, of `size` ranks; None for one."""
    if size == 1:
        return None
    return _mesh(training, size)["cp"].get_group()


def deal_to_groups(training: TrainingArguments, accelerator: Any, ranks: SequenceGroup) -> None:
    """Have accelerate hand each batch to all the processes that share its rows.

    Raises:
        UnsupportedModelError: they are not neighbours, or it cuts the model in another way too.
    """
    from torch.distributed import get_process_group_ranks

    first = training.process_index // ranks.size * ranks.size
    members = get_process_group_ranks(ranks.group)
    if members != list(range(first, first + ranks.size)):
        raise UnsupportedModelError(
            f"sequence_group must be {ranks.size} processes in a row, from {first} on, got "
            f"{members}; the last dimension of a DeviceMesh is"
        )
    if (getattr(accelerator.parallelism_config, "tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            "ParallelismConfig: tp_size must be 1 with a sequence_group, got "
            f"{accelerator.parallelism_config.tp_size}; it would not average gradients over it"
        )
    prepare, mesh = accelerator.prepare_data_loader, _mesh(training, ranks.size)

    def prepare_data_loader(*args: Any, **kwargs: Any) -> Any:
        # accelerate gives the processes along "cp" the same batches; for loaders alone
        before, accelerator.state.device_mesh = accelerator.state.device_mesh, mesh
        try:
            return prepare(*args, **kwargs)
        finally:
            accelerator.state.device_mesh = before

    accelerator.prepare_data_loader = prepare_data_loader


def _mesh(training: TrainingArguments, size: int) -> Any:
    """All processes, by the batch that they are given and by their place in the row."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = training.world_size // size, size
    return init_device_mesh(training.device.type, shape, mesh_dim_names=("dp_shard", "cp"))
