"""Where a model is looked for, and what is said where it is not: no test asks the Hub."""

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from flexmask.errors import DataError
from flexmask.tools.model_source import check_source


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, and beside it the cache of a Hub that holds Qwen/Qwen3-4B."""
    (tmp_path / "cache" / "models--Qwen--Qwen3-4B" / "snapshots" / "1a2b").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def hub_says(monkeypatch):
    """What lets the Hub answer with an error, or well; it returns the list of what was asked."""

    def answer(error=None):
        asked = []

        def ask(url):
            asked.append(url)
            if error is not None:
                raise error

        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
        return asked

    return answer


def http(kind):
    return kind.__new__(kind)  # without the response that it was made of


def test_folders_and_cached_names_are_not_asked_for(here, hub_says):
    asked = hub_says()
    (here / "model").mkdir()
    for source in ("model", "./model", str(here / "model"), "Qwen/Qwen3-4B"):
        check_source(source, "model")
    assert not asked


@pytest.mark.parametrize(
    "error",
    [None, *map(http, (GatedRepoError, RemoteEntryNotFoundError, HfHubHTTPError))],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_has_is_asked_for_once_and_left_to_transformers(here, hub_says, error):
    asked = hub_says(error)
    check_source("some/model", "model")
    assert asked == ["https://huggingface.co/some/model/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("./smollm", "./smolllm"),
        ("./modls/x", "./models"),
        ("models/big/lama/", "models/big/llama"),
        ("~/smolllm", "{home}/smolllm"),
        ("./far/from/all", None),
    ],
)
def test_a_path_is_refused_with_the_nearest_folder(here, hub_says, monkeypatch, source, meant):
    asked = hub_says()
    (here / "smolllm").mkdir()
    (here / "models" / "big" / "llama").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(here))
    guess = f" (did you mean {meant.format(home=here)}?)" if meant else ""
    with pytest.raises(DataError) as raised:
        check_source(source, "model")
    expected = f"{source}: no such folder{guess}; name a model's folder or hub id"
    assert str(raised.value) == expected
    assert not asked


@pytest.mark.parametrize(
    ("source", "meant"),
    [("Qwen/Qwen3-4b", "Qwen/Qwen3-4B"), ("smollm", "smolllm"), ("other/name", None)],
)
def test_a_name_that_the_hub_does_not_know_is_refused(here, hub_says, source, meant):
    (here / "smolllm").mkdir()
    asked = hub_says(http(RepositoryNotFoundError))
    guess = f" (did you mean {meant}?)" if meant else ""
    with pytest.raises(DataError) as raised:
        check_source(source, "tokenizer")
    assert str(raised.value).startswith(
        f"{source}: no such folder{guess}, and the Hub shows no tokenizer of that name; if it is"
    )
    assert len(asked) == 1


def test_a_hub_out_of_reach_is_told_after_one_request(here, hub_says):
    asked = hub_says(ConnectionError("Name or service not known"))
    with pytest.raises(DataError) as raised:
        check_source("Qwen/Qwen3-8B", "model")
    assert str(raised.value) == (
        f"Qwen/Qwen3-8B: no such folder (did you mean Qwen/Qwen3-4B?), nothing in "
        f"{here.parent / 'cache'}, and the Hub cannot be reached (Name or service not known); "
        "name a model's folder, or copy what `hf download Qwen/Qwen3-8B` puts there from a machine "
        "with a network"
    )
    assert len(asked) == 1
