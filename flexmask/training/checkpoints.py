"""Checkpoints that are whole or not there, so that a run can be killed at any moment.

The Trainer of transformers writes a checkpoint file by file under its final name, and resumes from
the newest name. Here it is written in a folder beside, which takes that name when every process has
finished. With it go the settings that its batches followed from, and a run with others does not
resume from it.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from flexmask.errors import DataError, FlexmaskError, one_line
from flexmask.files import disk_errors, write_json
from flexmask.packing.sampler import TreeBatchSampler
from flexmask.training.resume import SETTINGS_FILE, batch_settings, check_resumable

STAGING = "checkpoint.partial"  # in the output folder; what a killed run leaves in it is of no use


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints and saved models are whole or not there.

    In front of another Trainer it does the same for that one:
    ``class Resumable(ResumableTrainer, SFTTrainer)``.
    """

    batch_sampler: TreeBatchSampler | None = None
    _staging: Path | None = None  # while a checkpoint is being written: where
    _resumed_step: int | None = None  # of the checkpoint that the run went on from

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Remove what a killed run left half written, and train; say so where nothing is left to.

        Raises:
            DataError: data, processes or batches are not those of the run to resume.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(self.args.output_dir)) or True
        self._resumed_step = None
        if not isinstance(resume_from_checkpoint, bool | None):
            check_resumable(resume_from_checkpoint, self._batch_settings)
            state = Path(resume_from_checkpoint, "trainer_state.json")
            if state.is_file():
                self._resumed_step = TrainerState.load_from_json(str(state)).global_step
        if self.is_local_process_zero():
            shutil.rmtree(Path(str(self.args.output_dir)) / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._has_no_step and self.is_world_process_zero():
            option = "max_steps" if self.args.max_steps > 0 else "num_train_epochs"
            print(
                f"{resume_from_checkpoint}: is at step {self._resumed_step}, and --{option} "
                f"{getattr(self.args, option)} ends at step {self.state.max_steps}: nothing is "
                f"left to train; raise --{option} to go on",
                file=sys.stderr,
            )
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, but for the mean loss of a run without a step, which would be 0."""
        if not ("train_loss" in logs and self._has_no_step):
            super().log(logs, *args, **kwargs)

    @property
    def _has_no_step(self) -> bool:
        """Whether nothing has been trained since the run was resumed."""
        return self.state.global_step == self._resumed_step

    @cached_property
    def _batch_settings(self) -> dict[str, Any]:
        return batch_settings(
            self.args,
            self.train_dataset,
            self.data_collator,
            self.batch_sampler,
            num_processes=self.num_data_processes,
        )

    @property
    def num_data_processes(self) -> int:
        """How many processes are dealt different batches."""
        return self.args.world_size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless the run was resumed from its last step: it was killed after it."""
        if self.state.global_step >= self.state.max_steps:
            self._rotate(Path(self._get_output_dir(None)))  # it may have been killed before that
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, each file whole or not at all; sharded ones are put together.

        Raises:
            DataError: the disk is full, or cannot be written to.
        """
        if _internal_call:
            return super().save_model(output_dir, True)
        folder = Path(str(output_dir or self.args.output_dir))
        with _staged(folder) as staging, self._whole_state_dict():
            super().save_model(str(staging), True)
            if self.args.should_save:
                for file in staging.iterdir():
                    os.replace(file, folder / file.name)
                staging.rmdir()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository that `push_to_hub` uploads to; DataError where that fails."""
        with hub_errors("nothing has been trained; log in, or leave the option out"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload what is saved; DataError where that fails."""
        output = self.args.output_dir
        with hub_errors(f"the model is saved: `hf upload {self.hub_model_id} {output}` uploads it"):
            return super().push_to_hub(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        with _staged(run_dir) as self._staging:
            staged = self._staging / final.name
            try:
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    write_json(self._batch_settings, staged / SETTINGS_FILE)
                if self.state.best_model_checkpoint == str(staged):
                    self.state.best_model_checkpoint = str(final)
                    if self.args.should_save:
                        self.state.save_to_json(str(staged / "trainer_state.json"))
                self.accelerator.wait_for_everyone()  # each has written its part
                if self.is_world_process_zero():
                    _rename(staged, final)
                self.accelerator.wait_for_everyone()
                if self.is_local_process_zero() and staged.exists():  # on a disk of its own
                    _rename(staged, final)
            finally:
                self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        self._rotate(run_dir)

    def _rotate(self, run_dir: Path) -> None:
        """Remove checkpoints beyond `save_total_limit`, the oldest first, never the best."""
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of what a checkpoint lacks, but for weights that are tied to others: saved once."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # an upload goes on in the background, so never from there
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _whole_state_dict(self) -> Iterator[None]:
        """A block in which FSDP gathers the shards of the model when it is saved."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            yield
            return
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(before)


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """`disk_errors` for files that torch and safetensors write to `path`."""
    with disk_errors(path, "free some space, and resume; earlier checkpoints are whole"):
        try:
            yield
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = (int(found[1]),) if found else ()
            raise OSError(*number, str(error)) from error
        except RuntimeError as error:  # the file writer of torch.save, which does not say why
            if str(error).startswith("Parent directory"):
                raise FileNotFoundError(errno.ENOENT, f"No such file: {error}") from error
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise OSError("the disk did not take a whole file") from error
        except CheckpointException as error:  # of all processes; not a child of Exception
            reason = next(iter(error.failures.values()))[0]
            raise OSError(str(reason)) from reason


@contextmanager
def hub_errors(remedy: str) -> Iterator[None]:
    """A block that talks to the hub, and raises DataError, of one line, if it cannot."""
    try:
        yield
    except FlexmaskError:
        raise
    except Exception as error:  # of the HTTP library, which is not the same in every version
        raise DataError(f"--push_to_hub: {one_line(error)}; {remedy}") from error


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder in `folder` to write in; where that fails, it goes, and DataError says why."""
    staging = folder / STAGING
    with checkpoint_errors(folder):
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _rename(staged: Path, final: Path) -> None:
    """Move a folder out of its staging; one of that name, of an earlier run, makes place."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)


@atexit.register
def _let_gloo_settle() -> None:
    """Wait until gloo's threads have dropped their last work, or they can abort a finished run.

    They take the GIL for it, and Python before 3.14 ends a thread that asks for the GIL at the end
    of the program, inside a C++ destructor that must not be left so: SIGABRT, one exit in fifty
    (measured on two cores with torch 2.13). Neither joining these threads nor waiting for this is
    offered: DistributedDataParallel keeps them alive even when it is deleted.
    """
    if torch.distributed.is_initialized() and "gloo" in torch.distributed.get_backend_config():
        time.sleep(1)
