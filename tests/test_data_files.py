"""Files of conversations, good and bad."""

import json

import pytest
from command_cases import run
from transformers import AutoTokenizer

from flexmask.data.files import BadLine, read_conversations
from flexmask.data.prepare import prepare
from flexmask.data.prepared import open_prepared
from flexmask.data.renderer import Renderer
from flexmask.data.sources import find_data_files
from flexmask.data.trees import load_trees
from flexmask.data.unused import describe_unused
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import DataError

GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "4"}]}
)
DEEP = "[" * 500 + "]" * 500
BAD = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "bot"}]})


KEYS = {"source": "x", "chat_template_kwargs": {"enable_thinking": False, "tone": "calm"}}


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines: str | bytes):
        path = tmp_path / "data.jsonl"
        raw = [line.encode() if isinstance(line, str) else line for line in lines]
        path.write_bytes(b"\n".join(raw))
        return path

    return write_lines


def test_conversations_know_their_line_and_blank_lines_count(write):
    path = write(GOOD, "", "  ", GOOD)
    assert [one.where for one in read_conversations(path)] == [f"{path}:1", f"{path}:4"]


def test_file_is_read_anew_by_every_iteration(write):
    file = read_conversations(write(GOOD, BAD, GOOD), on_bad_line="skip")
    assert [len(list(file)), len(list(file))] == [2, 2]
    assert len(file.bad_lines) == 1


def test_byte_order_mark_and_windows_line_ends_are_accepted(write):
    assert len(list(read_conversations(write(b"\xef\xbb\xbf" + GOOD.encode() + b"\r", GOOD)))) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (BAD, "message 1 has role 'bot'; roles are system, user, assistant, tool"),
        ("{", "the line is not JSON .*; write one JSON object a line"),
        ("[1, 2", "the line is not JSON"),
        ("17", "a conversation must be an object or a list, got int"),
        (b'"\xe9"', "not UTF-8 at byte 1; convert the file, as `iconv -f LATIN1"),
        (GOOD.encode("utf-16"), "the file is UTF-16; convert it, as `iconv -f UTF-16 -t UTF-8`"),
        (b"\x1f\x8b\x08", "the file is compressed by gzip; let its name end in .jsonl.gz"),
        ("[" * 100_000, "the line is nested too deep"),
        (
            f'{{"x": {DEEP}, ' + GOOD[1:],
            "the line is nested too deep: lists and objects may go 100",
        ),
        (f'{{"tools": "{DEEP}", ' + GOOD[1:], "tools is nested too deep"),
    ],
    ids=["role", "json", "list", "number", "bytes", "utf-16", "gzip", "deeper", "deep", "tools"],
)
def test_bad_line_is_reported_with_its_number_or_listed(write, line, reason):
    path = write(GOOD, line, GOOD)
    with pytest.raises(DataError, match=f"data.jsonl:2: {reason}") as error:
        list(read_conversations(path))
    assert "\n" not in str(error.value)
    file = read_conversations(path, on_bad_line="skip")
    assert len(list(file)) == 2
    assert file.bad_lines == [BadLine(2, str(error.value))]


def test_lines_before_a_bad_one_are_given_first(write):
    conversations = iter(read_conversations(write(GOOD, BAD)))
    assert next(conversations).messages[1]["content"] == "4"
    with pytest.raises(DataError, match=r"data.jsonl:2"):
        next(conversations)


@pytest.mark.parametrize("lines", [[], ["", "  ", ""]], ids=["nothing", "blank"])
def test_rejects_empty_file(write, lines):
    with pytest.raises(DataError, match=r"data.jsonl: the file is empty; write one conversation"):
        list(read_conversations(write(*lines)))


def test_rejects_file_of_bad_lines_only(write):
    file = read_conversations(write(BAD, "{"), on_bad_line="skip")
    with pytest.raises(DataError, match=r"no conversation can be used; the first: .*:1: message 1"):
        list(file)
    assert [bad.line for bad in file.bad_lines] == [1, 2]


def test_rejects_missing_file_and_directory_at_once(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a directory; name a file of conversations"):
        read_conversations(tmp_path)


def test_rejects_unknown_policy(write):
    with pytest.raises(DataError, match="must be 'error' or 'skip', got 'ignore'"):
        read_conversations(write(GOOD), on_bad_line="ignore")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"messages": []}, {"messages": []}]', r":1: is a list of 2 conversations; write one a"),
        ("[\n  {}\n]", r":1: the line is not JSON .* such as `jq -c '\.\[\]' FILE.json > FILE"),
        (
            '{\n  "messages": []\n}',
            r":1: the line is not JSON .* such as `jq -c \. FILE.json",
        ),
    ],
)
def test_an_array_of_conversations_is_told_how_to_become_lines(tmp_path, text, message):
    path = tmp_path / "array.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_conversations(path))


def test_greetings_are_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    greeting = {"role": "assistant", "content": "Hello!"}
    path.write_text(f"{GOOD}\n" + json.dumps([greeting, *json.loads(GOOD)["messages"]]))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    trees = load_trees([path], Renderer(tokenizer))
    assert trees.summary().endswith("; 1 greeting of the assistant, context alone")
    assert prepare([path], tmp_path / "prepared", tokenizer)["greetings"] == 1


def test_keys_that_nothing_is_made_of_are_named_with_their_counts(tmp_path, capsys):
    record = json.loads(GOOD)
    record["messages"][0] |= {"mood": 1, "tool_call_id": "a"}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({**record, **more}) + "\n" for more in (KEYS, {}, KEYS)))
    options = ("--tokenizer", str(TOKENIZER_PATH))
    for words in (("plan",), ("prepare", "--output", str(tmp_path / "prepared"))):
        assert run(words[0], path, *options, *words[1:]) == 0
        assert (
            "\nkeys not used: messages.mood (3 conversations), chat_template_kwargs.tone (2), "
            "source (2)\n"
        ) in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    counts = load_trees([path], Renderer(tokenizer)).unused_keys
    assert counts == {"messages.mood": 3, "chat_template_kwargs.tone": 2, "source": 2}
    assert open_prepared(tmp_path / "prepared", tokenizer).unused_keys == counts
    many = {str(number): 1 for number in range(10)}
    assert describe_unused(many).endswith("7 (1) and 2 more")


@pytest.mark.parametrize("read", [read_conversations, lambda path: find_data_files([path])])
def test_only_training_reads_a_prepared_folder(tmp_path, read):
    (tmp_path / "settings.json").touch()
    with pytest.raises(DataError, match="is a folder of `flexmask prepare`, which only"):
        read(tmp_path)
