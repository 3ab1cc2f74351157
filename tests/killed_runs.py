"""Runs of `flexmask train`, killed at any moment or out of disk, in children of a small process.

Writes to the file named first, as JSON, what became of them; the folder named second has the model
and the data.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import flexmask.training.trainer  # noqa: F401 - so that the children need not load it again
from flexmask.tools.cli import main as flexmask_main

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def in_child(function, *arguments):
    """(exit code or minus signal, what was said) of a function in a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "w") as pipe, contextlib.redirect_stderr(io.StringIO()) as said:
            code = 0
            try:
                function(*arguments)
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            pipe.write(said.getvalue())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def run(files, output, steps, *others):
    flexmask_main(
        [str(word) for word in ("train", files / "data.jsonl", "--model", files)]
        + ["--output", str(output), "--max_steps", str(steps), "--save_steps", "1"]
        + ["--save_total_limit", "1", "--per_device_train_batch_size", "2", "--use_cpu"]
        + ["--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--disable_tqdm", "true"]
        + list(others)
    )


def run_until(limit, files, output, *others):
    """Die at the touch of the output folder with number `limit`; say how many there were."""
    touched = 0

    def watch(event, arguments):
        nonlocal touched
        if event in WRITES and str(arguments[0]).startswith(str(output)):
            if event == "open" and not (set(str(arguments[1])) & set("wax+")):
                return
            touched += 1
            if touched == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        run(files, output, 2, *others)
    finally:
        print(f"touched {touched}", file=sys.stderr)


def run_with_files_below(num_bytes, files, output, *others):
    """A disk on which files end at `num_bytes`: writing says so, as on one that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    run(files, output, 2, *others)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kill_everywhere(files, folder, results):
    code, said = in_child(run_until, None, files, folder / "whole")
    assert code == 0, said
    num_touches = int(said.split("touched ")[-1])
    whole = load_file(folder / "whole" / "model.safetensors")
    results["killed"] = []
    for limit in sorted({*range(1, num_touches + 1, num_touches // 5), num_touches}):
        output = folder / f"killed-{limit}"
        code, _ = in_child(run_until, limit, files, output)
        again, said = in_child(run, files, output, 2, "--resume")
        assert again == 0, said
        ours = load_file(output / "model.safetensors")
        same = all(torch.equal(ours[name], whole[name]) for name in whole)
        same = same and files_in(output) == files_in(folder / "whole")
        results["killed"].append((limit, code, same))
        shutil.rmtree(output)


def fill_the_disk(files, folder, results):
    results["full"] = []
    size = (files / "model.safetensors").stat().st_size
    for num_bytes in (size // 2, size * 3 // 2):  # the model ends early; the optimizer's state does
        output = folder / f"full-{num_bytes}"
        assert in_child(run, files, output, 1)[0] == 0
        before = files_in(output)
        code, said = in_child(run_with_files_below, num_bytes, files, output, "--resume")
        is_left_alone = files_in(output) == before
        again, _ = in_child(run, files, output, 2, "--resume")
        results["full"].append((code, said, is_left_alone, again))


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, files = map(Path, sys.argv[1:])
    results = {}
    kill_everywhere(files, path.parent, results)
    fill_the_disk(files, path.parent, results)
    path.write_text(json.dumps(results))
