"""Resuming with other data, batches or processes: refused, with both values."""

import json
import warnings

import pytest
from model_cases import tiny_model
from trainer_cases import CONVERSATIONS, arguments, trees
from transformers import AutoTokenizer

from flexmask import FittedTrees, TreeBatchSampler, TreeCollator, patch
from flexmask.data.files import read_conversations
from flexmask.data.prepare import prepare
from flexmask.data.prepared import open_prepared
from flexmask.data.trees import split_dataset
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError
from flexmask.training.resume import SETTINGS_FILE, check_resumable, describe_data
from flexmask.training.trainer import TreeTrainer

ROW = 60  # tokens; two conversations fill one


def trainer(folder, data=None, rows_per_batch=None, collator=None, **settings):
    data = trees() if data is None else data
    sampler = None
    if rows_per_batch is not None:
        data = FittedTrees(data, ROW)
        sampler = TreeBatchSampler(data, max_tokens=ROW, rows_per_batch=rows_per_batch)
    return TreeTrainer(
        model=patch(tiny_model("llama")),
        args=arguments(folder, save_strategy="steps", save_steps=1, **settings),
        train_dataset=data,
        data_collator=collator or TreeCollator(max_tokens=ROW if rows_per_batch else None),
        batch_sampler=sampler,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of runs that ended after a step: by conversations, and by rows."""
    folder = tmp_path_factory.mktemp("runs")
    trainer(folder / "plain", max_steps=1).train()
    trainer(folder / "rows", rows_per_batch=1, max_steps=1).train()
    return {kind: folder / kind / "checkpoint-1" for kind in ("plain", "rows")}


@pytest.mark.parametrize("kind", ["plain", "rows"])
def test_the_same_run_goes_on_and_may_get_longer(kind, runs, tmp_path):
    rows = 1 if kind == "rows" else None
    again = trainer(tmp_path, rows_per_batch=rows, max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not say")
        again.train(resume_from_checkpoint=str(runs[kind]))
    assert again.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / SETTINGS_FILE).read_text() == (
        runs[kind] / SETTINGS_FILE
    ).read_text()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "plain",
            {"data": trees()[:3]},
            "data was '4 conversations with the digest [0-9a-f]+', is",
        ),
        ("plain", {"data": trees()[::-1]}, "is '4 conversations with the digest"),
        ("plain", {"data": trees("turn")}, "is '4 conversations with the digest"),
        ("plain", {"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4, is 2;"),
        ("plain", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1, is 2;"),
        ("plain", {"seed": 7}, "seed was 42, is 7;"),
        ("plain", {"rows_per_batch": 1}, "max_tokens was None, is 60"),
        ("rows", {"rows_per_batch": 2}, "rows_per_batch was 1, is 2; resume it as it was begun"),
        (
            "plain",
            {"collator": TreeCollator(weighting="conversation")},
            "weighting was 'token', is 'conversation';",
        ),
    ],
)
def test_another_run_is_refused_with_both_values(kind, changes, message, runs, tmp_path):
    other = trainer(tmp_path, max_steps=2, **changes)
    with pytest.raises(DataError, match=rf"checkpoint-1: the run would go on with .*{message}"):
        other.train(resume_from_checkpoint=str(runs[kind]))
    assert not list(tmp_path.iterdir())


def test_another_number_of_processes_is_refused(runs, tmp_path):
    record = json.loads((runs["rows"] / SETTINGS_FILE).read_text())
    assert record["processes"] == 1
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(record | {"processes": 2}))
    with pytest.raises(DataError, match=r"with other batches .*: processes was 2, is 1; resume it"):
        check_resumable(tmp_path, record)


def test_a_checkpoint_of_another_trainer_is_taken_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="does not say with what data and batches it was trained"):
        check_resumable(tmp_path, {})


def test_data_of_every_kind_are_told_apart_by_content_and_order(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(DATA_PATH.read_text().splitlines(keepends=True)[:6]))
    prepare([path], tmp_path / "prepared", tokenizer)
    prepared = open_prepared(tmp_path / "prepared", tokenizer)
    chats = list(read_conversations(path))
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    for data in (trees(), CONVERSATIONS, chats, raw):
        described = describe_data(data)
        assert described == describe_data(list(data))
        assert described != describe_data(data[::-1])
        assert described.startswith(f"{len(data)} conversations with the digest ")
    halves = split_dataset(prepared, 0.5, seed=0)
    assert len({describe_data(part) for part in (prepared, *halves)}) == 3
    assert describe_data(prepared) == describe_data(open_prepared(tmp_path / "prepared", tokenizer))
    assert describe_data(FittedTrees(prepared, 300, on_overflow="drop")) == describe_data(prepared)
    assert describe_data([object()]) == "1 conversation"
    assert describe_data(iter(chats)) == "a stream"
