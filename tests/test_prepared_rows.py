"""`flexmask prepare --output_format samples`: rows for other trainers, whatever happens."""

import json
import shutil

import pytest
from command_cases import run, write_model
from datasets import load_dataset

from flexmask import open_prepared, prepare, render_samples
from flexmask.data.files import read_conversations
from flexmask.data.rows import sample_row
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError

LINES = DATA_PATH.read_text().splitlines(keepends=True)[:12]
BAD = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join([*LINES[:6], BAD, *LINES[6:]]))
    return path


@pytest.fixture
def make(data, tokenizer):
    def prepare_rows(folder, **options):
        options = {"shard_lines": 4, "on_bad_line": "skip", "output_format": "samples"} | options
        return prepare([data], folder, tokenizer, **options)

    return prepare_rows


@pytest.fixture(scope="module")
def whole(data, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "whole"
    options = {"shard_lines": 4, "on_bad_line": "skip", "output_format": "samples"}
    return folder, prepare([data], folder, tokenizer, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_rows(folder):
    files = sorted(folder.glob("shard-*.jsonl"))
    return [json.loads(line) for file in files for line in file.open()]


def test_rows_are_the_samples_of_all_conversations_in_order(whole, data, tokenizer, tmp_path):
    expected = [
        sample_row(sample) | {"where": chat.where}
        for chat in read_conversations(data, on_bad_line="skip")
        for sample in render_samples(chat, tokenizer)
    ]
    folder, manifest = whole
    assert read_rows(folder) == expected
    assert manifest["samples"] == len(expected)
    loaded = load_dataset(
        "json",
        data_files=str(folder / "shard-*.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.to_list() == expected


def test_a_manifest_has_the_same_counts_as_that_of_trees(whole, make, tmp_path):
    trees = make(tmp_path / "trees", output_format="trees")
    rows = whole[1]
    assert trees.keys() == rows.keys()
    different = {name for name, value in trees.items() if rows[name] != value}
    assert different == {"output_format", "shards"}
    left_out = [folder / "left_out.jsonl" for folder in (whole[0], tmp_path / "trees")]
    assert len({file.read_text() for file in left_out}) == 1
    with pytest.raises(DataError, match="was begun with output_format 'trees', not 'samples'"):
        make(tmp_path / "trees")


def test_rows_are_the_same_with_any_number_of_processes(whole, make, tmp_path):
    make(tmp_path / "out", num_proc=2)
    assert contents(tmp_path / "out") == contents(whole[0])


@pytest.mark.parametrize("damage", ["cut", "lost", "unmarked", "partial"])
def test_a_run_goes_on_and_makes_damaged_rows_anew(damage, whole, make, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    shard = folder / "shard-00001.jsonl"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "lost":
        shard.unlink()
    elif damage == "unmarked":  # killed between the rows and what tells that they are whole
        shard.with_suffix(".json").unlink()
    else:
        (folder / "manifest.json").unlink()
        (folder / "shard-00001.jsonl.7.partial").write_text("half")
    untouched = (folder / "shard-00000.jsonl").stat().st_mtime_ns
    make(folder)
    assert contents(folder) == contents(whole[0])
    assert (folder / "shard-00000.jsonl").stat().st_mtime_ns == untouched


def test_rows_have_weights_where_one_is_asked_for(make, tmp_path):
    make(tmp_path / "out", weighting="turn")
    for row in read_rows(tmp_path / "out"):
        assert sum(row["loss_weights"]) == pytest.approx(1)
        assert [w > 0 for w in row["loss_weights"]] == [label != -100 for label in row["labels"]]


def test_a_message_with_a_weight_needs_that_column(tokenizer, tmp_path):
    answer = {"role": "assistant", "content": "4", "weight": 0.5}
    record = json.dumps([{"role": "user", "content": "2 + 2?"}, answer])
    (tmp_path / "data.jsonl").write_text(record)
    with pytest.raises(DataError, match=r"data\.jsonl:1: message 1 has a weight, for which rows"):
        prepare([tmp_path / "data.jsonl"], tmp_path / "out", tokenizer, output_format="samples")


def test_a_bad_line_stops_the_run_and_leaves_no_half(make, tmp_path):
    with pytest.raises(DataError, match=r"conversations.jsonl:7: no assistant message"):
        make(tmp_path / "out", on_bad_line="error")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["settings.json", "shard-00000.json", "shard-00000.jsonl"]


def test_flexmask_trains_on_trees_alone(whole, tokenizer, tmp_path, capsys):
    with pytest.raises(DataError, match="holds samples for other trainers"):
        open_prepared(whole[0], tokenizer)
    model = write_model(tmp_path / "model")
    options = ("--model", model, "--output", tmp_path / "run", "--from_config", "--use_cpu")
    assert run("train", whole[0], *options) == 2
    assert "prepare the data with --output_format trees" in capsys.readouterr().err


def test_the_command_says_where_the_rows_are(data, tmp_path, capsys):
    options = ("--tokenizer", TOKENIZER_PATH, "--on_bad_line", "skip")
    assert run("prepare", data, *options, "--output", tmp_path, "--output_format", "samples") == 0
    out = capsys.readouterr().out
    assert "12 conversations, " in out
    assert f"one sample a line in {tmp_path}/shard-*.jsonl" in out
