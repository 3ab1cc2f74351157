"""`flexmask prepare`: conversations into a folder of trees, whatever happens on the way."""

import errno
import gzip
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time

import numpy as np
import psutil
import pyarrow
import pytest
from command_cases import run, write_model
from pyarrow import parquet
from transformers import AutoTokenizer

from flexmask.data import output_formats, prepare_pool
from flexmask.data import prepare as prepare_module
from flexmask.data.prepare import prepare
from flexmask.data.prepared import open_prepared
from flexmask.data.renderer import Renderer
from flexmask.data.shards import Shard
from flexmask.data.sources import find_data_files
from flexmask.data.tokenize import tokenizer_fingerprint
from flexmask.data.trees import load_trees, split_dataset
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError
from flexmask.packing.fitting import FittedTrees

LINES = DATA_PATH.read_text().splitlines(keepends=True)[:40]
BAD = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join(LINES))
    return path


@pytest.fixture(scope="module")
def whole(data, tokenizer, tmp_path_factory):
    """The folder that an uninterrupted run leaves: 5 shards of 8 lines."""
    folder = tmp_path_factory.mktemp("prepared") / "whole"
    prepare([data], folder, tokenizer, shard_lines=8)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal_trees(trees, others):
    assert len(trees) == len(others)
    for tree, other in zip(trees, others, strict=True):
        assert (tree.segments, tree.leaves) == (other.segments, other.leaves)
        assert tree.input_ids.dtype == other.input_ids.dtype
        assert (tree.input_ids == other.input_ids).all()
        for leaf, same in zip(tree.leaves, other.leaves, strict=True):
            assert leaf.weights.tolist() == same.weights.tolist()


@pytest.mark.parametrize("weighting", ["token", "turn"])
def test_trees_equal_those_of_the_file(weighting, data, tokenizer, tmp_path):
    loaded = load_trees([data], Renderer(tokenizer, weighting))
    prepare([data], tmp_path / "out", tokenizer, weighting=weighting, shard_lines=16)
    dataset = open_prepared(tmp_path / "out", tokenizer, weighting=weighting)
    assert_equal_trees(dataset, loaded.trees)
    assert dataset.num_tokens.tolist() == [tree.num_tokens for tree in loaded.trees]
    assert dataset.num_tokens.dtype == dataset.num_pairs.dtype == np.int64
    for tree, pairs in zip(loaded.trees[:3], dataset.num_pairs, strict=False):
        runs = zip(tree.depths, tree.lengths, strict=True)
        assert pairs == sum(at + 1 for start, length in runs for at in range(start, start + length))
    assert dataset.place(17) == f"{data}:18"


def test_parts_and_pickled_copies_hold_the_same_trees(whole, tokenizer):
    dataset = open_prepared(whole, tokenizer)
    first, rest = split_dataset(dataset, 0.25, seed=1)
    assert (len(first), len(rest)) == (10, 30)
    assert {*map(first.place, range(10)), *map(rest.place, range(30))} == {
        *map(dataset.place, range(40))
    }
    copy = pickle.loads(pickle.dumps(first))
    assert_equal_trees(copy, first)
    assert (copy.num_tokens == first.num_tokens).all()
    with pytest.raises(IndexError):
        first[10]


def test_output_is_the_same_with_any_number_of_processes(data, whole, tokenizer, tmp_path):
    done = []
    prepare([data], tmp_path / "out", tokenizer, shard_lines=8, num_proc=3, progress=done.append)
    assert contents(tmp_path / "out") == contents(whole)
    assert done == [8] * 5


def as_gzip(path, text):
    path.write_bytes(gzip.compress(text.encode()))


def as_zstd(path, text):
    frames = [text[: len(text) // 2], text[len(text) // 2 :]]  # as tools that split do
    codec = pyarrow.Codec("zstd")
    path.write_bytes(b"".join(codec.compress(f.encode(), asbytes=True) for f in frames))


def as_parquet(path, text):
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(s) for s in text.splitlines()]), path)


WRITERS = {"jsonl.gz": as_gzip, "jsonl.zst": as_zstd, "parquet": as_parquet}


def test_every_format_gives_the_same_trees(whole, tokenizer, tmp_path):
    for place, (suffix, write) in enumerate(WRITERS.items()):
        write(tmp_path / f"part-{place}.{suffix}", "".join(LINES[place * 10 : place * 10 + 10]))
    (tmp_path / "part-3.jsonl").write_text("".join(LINES[30:]))
    prepare([tmp_path], tmp_path / "out", tokenizer, shard_lines=8)
    dataset = open_prepared(tmp_path / "out", tokenizer)
    assert_equal_trees(dataset, open_prepared(whole, tokenizer))
    assert dataset.place(25) == f"{tmp_path / 'part-2.parquet'}:6"


def test_files_come_from_folders_and_patterns_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt", "deep/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [file.name for file in find_data_files([tmp_path])]
    assert names == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert [file.name for file in find_data_files([f"{tmp_path}/b.*"])] == ["b.jsonl"]
    with pytest.raises(DataError, match=r"x\*: no such file; flexmask reads \.jsonl, "):
        find_data_files([f"{tmp_path}/x*"])
    with pytest.raises(DataError, match=r"b\.jsonl: is named twice"):
        find_data_files([tmp_path / "b.jsonl", tmp_path])


def in_process(target):
    """Run `target` in a process of its own; returns how it ended."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    return process.exitcode


def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(module, name, number):
    """Make the call of that number to `module.name` the last thing that this process does."""
    function, left = getattr(module, name), [number]

    def counting(*args, **kwargs):
        left[0] -= 1
        return kill_self() if left[0] < 0 else function(*args, **kwargs)

    setattr(module, name, counting)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (os, "fsync", 0),  # in the middle of the first shard
        (os, "replace", 1),  # the first shard is written and has not got its name
        (os, "fsync", 2),  # some shards are finished
        (prepare_module, "write_json", 0),  # nothing is there but the folder
        (prepare_module, "write_json", 1),  # all but the manifest is there
        (json, "dumps", 2),  # a shard is rendered, and nothing of it written
    ],
)
def test_killed_run_goes_on_to_the_same_folder(
    module, name, number, num_proc, data, whole, tokenizer, tmp_path
):
    def begin():
        kill_at_call(module, name, number)
        prepare([data], tmp_path / "out", tokenizer, shard_lines=8, num_proc=num_proc)

    if in_process(begin) == 0:
        pytest.fail("the run was not killed")
    assert not (tmp_path / "out" / "manifest.json").exists()
    prepare([data], tmp_path / "out", tokenizer, shard_lines=8)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.fixture
def writing(data, tokenizer, tmp_path):
    """A run in another process, which is in the middle of writing `tmp_path / "out"`."""
    context = multiprocessing.get_context("fork")
    begun, never = context.Event(), context.Event()

    def begin():
        prepare(
            [data],
            tmp_path / "out",
            tokenizer,
            shard_lines=8,
            num_proc=2,
            progress=lambda _: (begun.set(), never.wait(60)),
        )

    process = context.Process(target=begin)
    process.start()
    assert begun.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_folder_takes_one_run_at_a_time_and_a_killed_one_leaves_it_free(
    writing, data, whole, tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    monkeypatch.setattr("flexmask.files._PATIENCE_S", 0.0)
    with pytest.raises(DataError, match="out: is being written by another run; wait for its end"):
        prepare([data], folder, tokenizer, shard_lines=8)
    monkeypatch.undo()
    writing.kill()
    writing.join()
    prepare([data], folder, tokenizer, shard_lines=8)
    assert contents(folder) == contents(whole)


def test_a_folder_that_cannot_be_locked_is_written_with_a_warning(
    data, whole, tokenizer, tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="out: files cannot be locked here; see to it that"):
        prepare([data], tmp_path / "out", tokenizer, shard_lines=8)
    assert contents(tmp_path / "out") == contents(whole)


def test_finished_shards_are_not_made_again(data, whole, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "shard-00003.safetensors").unlink()
    (tmp_path / "out" / "shard-00004.safetensors.partial").write_text("half")
    made = []
    write = output_formats.write_shard
    monkeypatch.setattr(
        output_formats, "write_shard", lambda path, *of: made.append(path.name) or write(path, *of)
    )
    prepare([data], tmp_path / "out", tokenizer, shard_lines=8)
    assert made == ["shard-00003.safetensors"]
    assert contents(tmp_path / "out") == contents(whole)


def test_processes_end_with_the_first_one(data, tokenizer, tmp_path):
    def begin():
        def note(_):
            pids = [process.pid for process in multiprocessing.active_children()]
            (tmp_path / "pids").write_text(json.dumps(pids))
            kill_self()

        prepare([data], tmp_path / "out", tokenizer, shard_lines=2, num_proc=2, progress=note)

    assert in_process(begin) == -signal.SIGKILL
    pids = json.loads((tmp_path / "pids").read_text())
    assert len(pids) == 2
    until = time.monotonic() + 30
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids):
        assert time.monotonic() < until, "a process outlives the first one"
        time.sleep(0.05)


def test_killed_process_is_named_with_the_remedy(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_pool.ShardMaker, "make", kill_self)
    with pytest.raises(DataError, match=r"one of the 2 processes was killed.* smaller --num_proc"):
        prepare([data], tmp_path / "out", tokenizer, shard_lines=8, num_proc=2)


def test_full_disk_is_reported_and_the_run_goes_on_later(data, whole, tokenizer, tmp_path):
    def begin():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(DataError, match=r"cannot be written: .*; make room, .* run the same"):
            prepare([data], tmp_path / "out", tokenizer, shard_lines=8)

    assert in_process(begin) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]
    prepare([data], tmp_path / "out", tokenizer, shard_lines=8)
    assert contents(tmp_path / "out") == contents(whole)


def test_truncated_shard_is_refused_and_made_anew(data, whole, tokenizer, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    shard = folder / "shard-00002.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(DataError, match=r"shard-00002.* is damaged .*run the same `flexmask prep"):
        open_prepared(folder, tokenizer)
    prepare([data], folder, tokenizer, shard_lines=8)
    assert contents(folder) == contents(whole)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: is missing; run the same"):
        open_prepared(folder, tokenizer)


@pytest.mark.parametrize("suffix", WRITERS)
def test_truncated_data_file_is_an_error_whatever_is_skipped(suffix, tokenizer, tmp_path):
    path = tmp_path / f"data.{suffix}"
    WRITERS[suffix](path, "".join(LINES))
    whole_data = path.read_bytes()
    path.write_bytes(whole_data[:-20])
    with pytest.raises(DataError, match=r"data\..*: is damaged or was cut short after line \d+ \("):
        prepare([path], tmp_path / "out", tokenizer, shard_lines=8, on_bad_line="skip")
    path.write_bytes(whole_data)
    prepare([path], tmp_path / "out", tokenizer, shard_lines=8, on_bad_line="skip")
    assert len(open_prepared(tmp_path / "out", tokenizer)) == 40


def test_bad_line_stops_the_run_or_is_listed(data, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join([*LINES[:9], BAD, "\n", '{"messages": [\n', *LINES[9:12]]))
    with pytest.raises(DataError, match=r"data.jsonl:10: no assistant message"):
        prepare([path], tmp_path / "out", tokenizer, shard_lines=4, num_proc=2)
    made = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("shard-*")}
    assert made
    manifest = prepare([path], tmp_path / "out", tokenizer, shard_lines=4, on_bad_line="skip")
    assert all((tmp_path / "out" / name).read_bytes() == old for name, old in made.items())
    with pytest.raises(DataError, match=r"out: was begun with on_bad_line 'skip', not 'error'"):
        prepare([path], tmp_path / "out", tokenizer, shard_lines=4)
    prepare([path], tmp_path / "new", tokenizer, shard_lines=4, on_bad_line="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    listed = [json.loads(s) for s in (tmp_path / "new" / "left_out.jsonl").open()]
    assert [bad["where"] for bad in listed] == [f"{path}:10", f"{path}:12"]
    assert (manifest["bad_lines"], manifest["conversations"]) == (2, 12)
    dataset = open_prepared(tmp_path / "new", tokenizer)
    assert [bad.line for bad in dataset.bad_lines] == [10, 12]
    assert dataset.place(9) == f"{path}:13"
    assert "12 conversations" in dataset.summary()
    assert "2 bad lines skipped" in dataset.summary()


def test_a_run_that_made_nothing_yet_may_begin_with_other_settings(data, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(BAD)
    with pytest.raises(DataError, match="no assistant message"):
        prepare([path], tmp_path / "out", tokenizer)
    prepare([data], tmp_path / "out", tokenizer, weighting="turn", shard_lines=8)
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings\.json: cannot be read: .*; use another"):
        prepare([data], tmp_path / "out", tokenizer, weighting="turn", shard_lines=8)


def test_a_finished_folder_may_be_finished_again_for_skipping_bad_lines(
    whole, data, tokenizer, tmp_path
):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    prepare([data], folder, tokenizer, shard_lines=8, on_bad_line="skip")
    prepare([data], tmp_path / "new", tokenizer, shard_lines=8, on_bad_line="skip")
    assert contents(folder) == contents(tmp_path / "new")


def test_rejects_data_without_a_conversation(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(BAD)
    with pytest.raises(DataError, match=r"no conversation can be used; the first: .*:1: no assis"):
        prepare([path], tmp_path / "out", tokenizer, on_bad_line="skip")


def test_rejects_other_settings_data_and_folders(data, whole, tokenizer, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    with pytest.raises(DataError, match="was begun with weighting 'token', not 'turn'; run the"):
        prepare([data], folder, tokenizer, weighting="turn", shard_lines=8)
    other = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    other.chat_template += " "
    with pytest.raises(DataError, match=r"was begun with tokenizer '[0-9a-f]+', not"):
        prepare([data], folder, other, shard_lines=8)
    moved = tmp_path / "conversations.jsonl"
    moved.write_text("".join([*LINES[:8], *LINES[9:]]))
    prepare([moved], tmp_path / "moved", tokenizer, shard_lines=8)
    (tmp_path / "moved" / "manifest.json").unlink()
    moved.write_text("".join(LINES))
    with pytest.raises(DataError, match=r"shard-00001\..* was made of other lines: the data have"):
        prepare([moved], tmp_path / "moved", tokenizer, shard_lines=8)
    moved.write_text("".join(LINES[:8]))
    with pytest.raises(DataError, match=r"shard-00001\..* was made of other lines: the data have"):
        prepare([moved], tmp_path / "moved", tokenizer, shard_lines=8)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(DataError, match="full: holds other files; name a new folder"):
        prepare([data], tmp_path / "full", tokenizer)
    with pytest.raises(DataError, match="--num_proc must be at least 1, got 0"):
        prepare([data], tmp_path / "new", tokenizer, num_proc=0)


def test_unfinished_folder_and_another_tokenizer_are_refused(whole, tokenizer, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(
        DataError, match=r"out: is not finished; run `flexmask prepare \.\.\. --out"
    ):
        open_prepared(tmp_path / "out", tokenizer)
    other = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    other.add_tokens(["flexmask"])
    with pytest.raises(DataError, match="made with another tokenizer or chat template than the mo"):
        open_prepared(whole, other)
    with pytest.raises(
        DataError, match="made with weighting 'token', not 'turn'; prepare the data"
    ):
        open_prepared(whole, tokenizer, weighting="turn")


def test_fingerprint_is_of_what_is_written_and_not_of_the_latest_call(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("two", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before


def test_a_budget_reads_only_the_trees_that_it_cuts(whole, tokenizer, monkeypatch):
    dataset = open_prepared(whole, tokenizer)
    read = []
    tree = Shard.tree
    monkeypatch.setattr(Shard, "tree", lambda self, index: read.append(index) or tree(self, index))
    budget = int(np.sort(dataset.num_tokens)[-3])
    fitted = FittedTrees(dataset, budget, on_overflow="drop")
    assert len(read) == fitted.split.trees == (dataset.num_tokens > budget).sum()
    assert fitted.num_tokens.max() <= budget
    with pytest.raises(
        DataError, match=r"conversations.jsonl:\d+: must have at most max_tokens = "
    ):
        FittedTrees(dataset, budget, on_overflow="error")


def test_training_on_a_prepared_folder_equals_training_on_the_file(data, tmp_path, capsys):
    model, folder = write_model(tmp_path / "model"), tmp_path / "prepared"
    assert run("prepare", data, "--tokenizer", model, "--output", folder) == 0
    assert "40 conversations, " in capsys.readouterr().out
    losses = []
    for source, output in ((data, "a"), (folder, "b")):
        train = ("train", source, "--model", model, "--output", tmp_path / output)
        steps = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1)
        others = ("--from_config", "--use_cpu", "--eval_split", 0.1, "--disable_tqdm", "true")
        assert run(*train, *steps, *others) == 0
        log = json.loads((tmp_path / output / "trainer_state.json").read_text())["log_history"]
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in log])
    assert losses[0] == losses[1]
    assert run("train", *train[1:], "--from_config", "--weighting", "turn") == 2
    assert "b: holds another run" in capsys.readouterr().err


def test_command_refuses_what_is_no_json_object(data, tmp_path, capsys):
    given = ("prepare", data, "--tokenizer", TOKENIZER_PATH, "--output", tmp_path / "out")
    assert run(*given, "--chat_template_kwargs", "[1]") == 2
    assert "must be a JSON object, got [1]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
