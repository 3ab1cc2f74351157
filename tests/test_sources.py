"""Words that name data: files, folders, datasets, and how often an epoch trains them."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from command_cases import run, write_conversations, write_model
from datasets import Dataset, DatasetDict

from flexmask import TreeCollator
from flexmask.data.dataset_split import DatasetSplit
from flexmask.data.file_formats import read_lines
from flexmask.data.prepare import prepare
from flexmask.data.prepared import open_prepared
from flexmask.data.renderer import Renderer
from flexmask.data.sources import find_data_files
from flexmask.data.trees import load_trees, repeat_by_weight
from flexmask.data.values import without_nulls
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.errors import DataError
from flexmask.training.data import load_datasets
from flexmask.training.options import TrainConfig
from flexmask.training.resume import describe_data

ROOT = Path(__file__).parent.parent
# of `datasets` the first record says which keys there are
RECORDS = [{"tools": None} | json.loads(line) for line in DATA_PATH.read_text().splitlines()[:12]]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved(folder):
    """A folder of `datasets` with two splits."""
    splits = {"train": Dataset.from_list(RECORDS[:8]), "test": Dataset.from_list(RECORDS[8:])}
    DatasetDict(splits).save_to_disk(folder / "saved")
    return "saved"


def named(*words, **settings):
    return {str(file): weight for file, weight in find_data_files(words, **settings).items()}


def weighted(tokenizer, *words, seed=0):
    """How often an epoch has each conversation of some words, by its place."""
    trees = load_trees(find_data_files(words), Renderer(tokenizer))
    chosen = repeat_by_weight(trees, seed)
    return Counter(map(chosen.place, range(len(chosen))))


def test_a_word_may_end_in_a_weight_unless_it_is_a_file_of_that_name(folder):
    for name in ("a.jsonl", "b.jsonl", "c:2", "part:1.jsonl"):
        write_conversations(folder / name, 1)
    words = ("a.jsonl:2", "b.jsonl", "c:2", "part:1.jsonl:0.5")
    assert named(*words) == {"a.jsonl": 2, "b.jsonl": 1, "c:2": 1, "part:1.jsonl": 0.5}
    assert named("?.jsonl:3") == {"a.jsonl": 3, "b.jsonl": 3}


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["a.jsonl:0"], {}, r"^a.jsonl:0: a weight must be above 0, got 0; leave the data out"),
        (["a.jsonl:2", "./a.jsonl"], {}, r"^a.jsonl: is named twice; name every file once"),
        (["b.jsonl:2"], {}, r"^b.jsonl:2: no such file; .* names on the Hub \(org/name\)"),
        (["parts/b.jsonl"], {}, "^parts/b.jsonl: no such file; flexmask reads .jsonl"),
        (["none"], {}, "^none: no such file"),
        (["a.jsonl"], {"split": "test"}, "^split 'test': a.jsonl: files have no splits"),
        (["saved"], {"split": "dev"}, "^saved: has no split 'dev'; it holds train, test"),
        (["saved/test"], {"split": "dev"}, "^saved/test: has no split 'dev'; it holds one without"),
        (["parts"], {}, "^parts: holds files of the splits test, train; choose one by --split"),
        (["parts"], {"split": "dev"}, "^parts: has no file of the split 'dev' by its name"),
    ],
)
def test_rejects_words_that_name_nothing_or_not_one_thing(folder, saved, words, settings, message):
    write_conversations(folder / "a.jsonl", 1)
    (folder / "parts").mkdir()
    for name in ("train-00.jsonl", "train-01.jsonl", "test-00.jsonl"):
        write_conversations(folder / "parts" / name, 1)
    with pytest.raises(DataError, match=message):
        find_data_files(words, **settings)


def test_a_folder_leaves_out_hidden_files_and_says_what_it_does_not_read(folder):
    for name in ("d/a.jsonl", "d/.a.jsonl", "d/.ipynb_checkpoints/a.jsonl", "d/b.json", "d/c.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
    with pytest.warns(UserWarning, match=r"d: 1 file of other endings left out: b\.json; flexmask"):
        assert named("d") == {"d/a.jsonl": 1}


def test_a_folder_of_parquet_is_read_by_split_where_its_files_are_named_so(folder):
    (folder / "parts" / "data").mkdir(parents=True)
    for split in ("train", "test_sft"):
        Dataset.from_list(RECORDS).to_parquet(f"parts/data/{split}-00000-of-00001.parquet")
    for split in ("train", "test", "test_sft"):
        (file,) = find_data_files(["parts"], split)
        assert file.name.startswith(split)


def test_a_folder_of_datasets_gives_the_conversations_that_it_was_made_of(saved, tokenizer):
    calls = Dataset.load_from_disk("saved/train")[4]["messages"][2]["tool_calls"]
    assert None in calls[0]["function"]["arguments"].values()  # filled up by Arrow
    for split, records in ((None, RECORDS[:8]), ("train", RECORDS[:8]), ("test", RECORDS[8:])):
        (file,) = find_data_files([saved], split)
        assert str(file) == f"saved/{split or 'train'}"
        assert [json.loads(line) for line in read_lines(file)] == without_nulls(records)
    trees = load_trees(find_data_files(["saved/test"]), Renderer(tokenizer))
    assert trees.place(3) == "saved/test:4"


def test_a_name_on_the_hub_is_loaded_with_its_subset_and_split(tokenizer, monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = ("org/name:2", "org-2/na.me/subset")
    expected = {"org/name[train]": 2, "org-2/na.me/subset[train]": 1}
    assert named(*words) == expected
    assert named("org/name", default_split="test") == {"org/name[test]": 1}
    trees = load_trees(find_data_files(words), Renderer(tokenizer))
    assert asked == [("org/name", "train"), ("org-2/na.me", "subset", "train")]
    assert (len(trees), trees.place(1), trees.weights) == (24, "org/name[train]:2", expected)


def test_a_dataset_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: Path("org/\nname").read_text())
    with pytest.raises(
        DataError, match=r"^org/name\[train\]: no such file here, .* cannot be loaded"
    ) as error:
        list(read_lines(DatasetSplit("org/name", "train")))
    assert "\n" not in str(error.value)
    monkeypatch.setattr("flexmask.errors.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"^org/name: no such file here; from the Hub it needs datasets"
    ):
        find_data_files(["org/name"])


def test_finding_data_imports_neither_datasets_nor_torch(saved):
    code = (
        "import sys; from flexmask.data.sources import find_data_files as find; find(sys.argv[1:])"
    )
    code += "; assert not {'datasets', 'pyarrow', 'torch', 'transformers'} & {*sys.modules}"
    words = (Path(saved).resolve(), "org/name")
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True)


def test_every_command_takes_the_same_words(folder, saved, tmp_path_factory, capsys):
    model = write_model(tmp_path_factory.mktemp("model"))
    test = ("saved:2", "--split", "test")
    renders = ("--tokenizer", TOKENIZER_PATH)
    builds = ("--model", model, "--from_config")
    assert run("plan", *test, *renders) == 0
    assert run("show", *test, *renders, "--index", 3) == 0
    assert "weights: they are for training" in capsys.readouterr().err
    assert run("prepare", *test, *renders, "--output", "prepared") == 0
    assert "prepared: 4 conversations, " in capsys.readouterr().out
    assert run("verify", *test, *builds, "--conversations", 1, "--max_verify_tokens", 600) == 0
    trains = (*builds, "--use_cpu", "--max_steps", 1, "--disable_tqdm", "true")
    evaluates = ("--eval_data", "saved")
    assert run("train", *test, *trains, *evaluates, "--output", "run") == 0
    report = capsys.readouterr().err
    assert "saved:2: 4 conversations, " in report
    assert "weights: of 4 conversations an epoch trains 8\n" in report
    assert "\nsaved: 4 conversations, " in report  # the split "test" by default
    assert run("train", "prepared", *trains, "--output", "again") == 0
    assert "weights: of 4 conversations an epoch trains 8\n" in capsys.readouterr().err
    assert run("train", "prepared", "--split", "test", *trains, "--output", "no") == 2
    assert "prepared: was prepared, and has no splits; leave out 'test'" in capsys.readouterr().err


def test_a_weight_is_how_often_an_epoch_trains_a_conversation(folder, tokenizer):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_conversations(folder / name, 8)
    counts = weighted(tokenizer, "a.jsonl:2", "b.jsonl:0.5", "c.jsonl:1.25")
    by_file = {name: Counter() for name in "abc"}
    for place, count in counts.items():
        by_file[place[0]][count] += 1
    assert by_file == {"a": {2: 8}, "b": {1: 4}, "c": {1: 6, 2: 2}}
    assert weighted(tokenizer, "a.jsonl:0.5") == weighted(tokenizer, "a.jsonl:0.5")
    assert weighted(tokenizer, "a.jsonl:0.5") != weighted(tokenizer, "a.jsonl:0.5", seed=1)
    assert len(weighted(tokenizer, "a.jsonl:0.01")) == 1


def test_a_prepared_folder_keeps_the_weights_of_its_files(folder, tokenizer):
    for name in ("a.jsonl", "b.jsonl"):
        write_conversations(folder / name, 8)
    words = ("a.jsonl:2", "b.jsonl:0.5")
    prepare(words, "prepared", tokenizer)
    chosen = repeat_by_weight(open_prepared("prepared", tokenizer), 0)
    assert Counter(map(chosen.place, range(len(chosen)))) == weighted(tokenizer, *words)
    with pytest.raises(DataError, match=r"was begun with weights \[2.0, 0.5\], not \[1.0, 1.0\]"):
        prepare(["a.jsonl", "b.jsonl"], "prepared", tokenizer)
    with pytest.raises(DataError, match="weights of data are for trees"):
        prepare(words, "rows", tokenizer, output_format="samples")


def test_what_is_held_out_is_not_trained_however_often_its_file_is(folder, tokenizer, capsys):
    write_conversations(folder / "a.jsonl", 8)
    config = TrainConfig(["a.jsonl:3"], "model", "run", eval_split=0.25)
    training = SimpleNamespace(process_index=0, seed=0, data_seed=None)
    trained, held_out = load_datasets(config, TreeCollator(tokenizer), training)
    assert (len(trained), len(held_out)) == (18, 2)
    assert not {*trained.places} & {*held_out.places}
    report = capsys.readouterr().err
    assert "evaluation: 2 conversations held out, 6 left to train\n" in report


@pytest.mark.parametrize("word", ["saved:2", "saved/test"])
def test_a_resumed_run_must_have_the_same_weights_and_split(saved, tokenizer, word):
    first, other = (
        repeat_by_weight(load_trees(find_data_files([one]), Renderer(tokenizer)), 0)
        for one in (saved, word)
    )
    assert describe_data(first) != describe_data(other)
