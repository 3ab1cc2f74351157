"""Commands of this Python, run in forks of one process that has the large libraries loaded.

So a test may start torchrun or `accelerate launch` with its ranks again and again: programs and
arguments are theirs, but torch and transformers, which take seconds to load, are loaded once.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile


def torchrun(size):
    """What starts a program in so many processes."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}")


TORCHRUN = torchrun(2)
LOADED = [
    "torch.distributed.run",
    "accelerate.commands.launch",
    "flexmask.training.trainer",
    "flexmask.tools.train.command",
    "peft",
]


def launch(*command, fails=False):
    """What a command of this Python said, after it ended as it should."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    with tempfile.NamedTemporaryFile("r") as said:
        process = context.Process(target=run_alone, args=(said.name, *map(str, command)))
        process.start()
        process.join(400)
        process.kill()
        process.join()
        text = said.read()
    assert (process.exitcode != 0) == fails, text[-3000:]
    return text


def run_alone(path, *command):
    """A command with an output of its own, whose ranks are forks of it."""
    import torch.distributed.run
    from torch.distributed import launcher

    elastic_launch = launcher.api.elastic_launch

    def forked(config, entrypoint):  # which is this Python, to be started for each rank
        config.start_method = "fork"
        return elastic_launch(config, run_python)

    launcher.api.elastic_launch = torch.distributed.run.elastic_launch = forked
    output = os.open(path, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_python(*command)


def run_python(*words):
    """What `python WORDS...` does: a file or `-m MODULE`, and its arguments."""
    words = [word for word in words if word != "-u"]
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            raise
