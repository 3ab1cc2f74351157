"""Runs a program of two processes, one of which is killed while they save step 4."""

import os
import runpy
import signal
import sys

from fsdp_on_cpu import allow_fsdp_on_cpu
from transformers import Trainer


def kill_while_saving(trainer, folder):
    if trainer.state.global_step == 4 and trainer.args.process_index == 1:
        print("killed while saving step 4", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    original(trainer, folder)


original = Trainer._save_rng_state
Trainer._save_rng_state = kill_while_saving
if "--fsdp" in sys.argv:
    allow_fsdp_on_cpu()
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
