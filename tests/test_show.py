"""`flexmask show`: what the tokens are, the row as text and as a picture, other orders of it."""

import json
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_cases import chat_case
from chat_tokenizer import chat_tokenizer, marking_tokenizer
from command_cases import run
from hypothesis import given
from hypothesis import strategies as st
from strategies import sample_lists, segment_trees

from flexmask import PrefixTree, build_tree, compile_mask
from flexmask.data.files import read_conversations
from flexmask.data.messages import parse_conversation
from flexmask.data.renderer import Renderer
from flexmask.demo import DATA_PATH, TOKENIZER_PATH
from flexmask.tools.show.kinds import label_tree
from flexmask.tools.show.orders import density, papers_order, tile_counts
from flexmask.tools.show.row_figures import RowPicture, draw_rows
from flexmask.tools.show.tree_text import shorten, tree_lines
from flexmask.tree.layout import lay_out, packed_index
from flexmask.tree.oracle import ancestry

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUMS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "content": "5"},
]
TEXT = """\
sums.jsonl:1: 4 messages, 2 samples
42 tokens in a single pass, 54 in N-pass (1.29 times as many)
thinking of earlier turns: interleaved, as the template does
density 0.041: visible pairs per pair in a visited tile of 128 x 128

packed  position   trained
  0:12      0:12   0 of 12  ●   context   <|im_start|>user\\n2+2?<|im_end|>\\n<|i…
 28:40     12:24  12 of 12  ├─● thinking  <think>\\nTwo and two.\\n</think>\\n\\n
 40:42     24:26    2 of 2  │ ● response  4<|im_end|>
 12:14     12:14    0 of 2  ●   response  4<|im_end|>
 14:26     14:26   0 of 12  ●   context   \\n<|im_start|>user\\n+1?<|im_end|>\\n<|…
 26:28     26:28    2 of 2  ●   response  5<|im_end|>
"""


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"messages": SUMS}) + "\n")
    return path


def labelled(record, tokenizer, **settings):
    conversation = parse_conversation(record)
    renderer = Renderer(tokenizer, chat_template_kwargs=settings)
    tree = renderer.tree(conversation)
    return tree, label_tree(tree, conversation, renderer)


def runs_of(tree, tokenizer):
    """(kind, text, number of trained tokens) of each segment."""
    stops = np.cumsum(tree.lengths)
    for segment, stop in zip(tree.segments, stops, strict=True):
        part = slice(stop - segment.length, stop)
        trained = int(np.count_nonzero(tree.loss_weights[part]))
        yield segment.kind, tokenizer.decode(tree.input_ids[part]), trained


def shipped(index):
    return list(read_conversations(DATA_PATH))[index]


def test_the_text_of_a_small_conversation(sums, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("show", sums, "--tokenizer", TOKENIZER_PATH) == 0
    assert capsys.readouterr().out == TEXT


def test_without_data_it_shows_what_ships(capsys):
    assert run("show", "--index", 3) == 0
    assert capsys.readouterr().out.startswith("tutoring.jsonl:4: ")


def test_kinds_of_a_conversation_with_thinking_and_a_tool(tokenizer):
    call = {"name": "add", "arguments": {"a": 2}}
    record = [
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "reasoning_content": "Call.", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "reasoning_content": "Done.", "content": "It is 4."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    question = "<|im_start|>user\nSum?<|im_end|>\n<|im_start|>assistant\n"
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    result = "\n<|im_start|>tool\nfour"
    prompt = "<|im_end|>\n<|im_start|>assistant\n"
    _, cut = labelled(record, tokenizer)
    found = [(kind, text, trained > 0) for kind, text, trained in runs_of(cut, tokenizer)]
    assert found == [
        ("context", question, False),
        ("thinking", "<think>\nCall.\n</think>\n\n", True),
        ("tool", written, True),
        ("tool", result, False),
        ("context", prompt, False),
        ("thinking", "<think>\nDone.\n</think>\n\n", True),
        ("response", "It is 4.<|im_end|>", True),
        ("tool", written + result, False),
        ("context", prompt, False),
        ("response", "It is 4.<|im_end|>", False),
        ("context", "\n<|im_start|>user\nSure?" + prompt, False),
        ("response", "Yes.<|im_end|>", True),
    ]


TEMPLATES = ("qwen3", "qwen3_6", "gptoss", "glm4moe", "nemotron_3_nano", "lfm2_2_5", "minimax_m3")


@pytest.mark.filterwarnings("ignore:the chat template ends assistant messages without")
@pytest.mark.parametrize("name", TEMPLATES)
def test_kinds_hold_the_words_of_their_fields_under_real_templates(name):
    tokenizer = chat_tokenizer(name)
    messages, tools = chat_case("system+thinking+tools")
    _, cut = labelled({"messages": messages, "tools": tools}, tokenizer)
    texts = dict.fromkeys(("context", "thinking", "response", "tool"), "")
    for kind, text, _ in runs_of(cut, tokenizer):
        texts[kind] += f"{text}\0"
    words = {
        "context": ["You teach sums.", "What is 2 plus 2?", "And plus 1?"],
        "thinking": ["I should call it.", "Two and two.", "One more\nthan four."],
        "response": ["It is 4.", "That makes 5."],
        "tool": ["add", "four"],
    }
    for kind, fields in words.items():
        for field in fields:
            assert field in texts[kind], (kind, field)
    for field in (*words["thinking"], *words["response"]):
        assert field not in texts["context"] + texts["tool"]


def test_kinds_are_the_same_where_a_tokenizer_marks_the_beginning_of_a_text():
    messages, _ = chat_case("plain")
    found = [
        [(kind, text.strip()) for kind, text, _ in runs_of(labelled(messages, t)[1], t)]
        for t in (chat_tokenizer("llama3"), marking_tokenizer("llama3"))
    ]
    assert [run[0] for run in found[0]] == [run[0] for run in found[1]]
    assert [run for run in found[0] if run[0] == "response"] == [
        run for run in found[1] if run[0] == "response"
    ]


def test_a_tokenizer_that_does_not_know_places_gives_context_and_response(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    _, cut = labelled(SUMS, tokenizer)
    for kind, _, trained in runs_of(cut, tokenizer):
        assert kind == ("response" if trained else "context")


@pytest.mark.parametrize("index", [0, 54, 197])
def test_labels_change_neither_tokens_nor_order(index, tokenizer):
    tree, cut = labelled(shipped(index), tokenizer)
    np.testing.assert_array_equal(cut.input_ids, tree.input_ids)
    np.testing.assert_array_equal(cut.loss_weights, tree.loss_weights)
    np.testing.assert_array_equal(packed_index(cut), packed_index(tree))
    np.testing.assert_array_equal(lay_out(cut).subtree_end, lay_out(tree).subtree_end)
    assert [leaf.key for leaf in cut.leaves] == [leaf.key for leaf in tree.leaves]


LINE = re.compile(r" *(\d+):(\d+) +(\d+):(\d+) +(\d+) of (\d+)  ")


@given(sample_lists())
def test_lines_add_up_to_the_tree(samples):
    tree = build_tree(samples)
    lines = [line for line in tree_lines(tree, lambda ids: "x" * len(ids), width=99) if line]
    matches = [LINE.match(line) for line in lines[1:]]
    found = [tuple(map(int, match.groups())) for match in matches if match]
    assert len(found) == len(lines) - 1 == len(tree.segments)
    assert sum(line[5] for line in found) == tree.num_tokens
    assert sum(line[4] for line in found) == np.count_nonzero(tree.loss_weights)
    packed = sorted(line[:2] for line in found)
    edges = [0, *(stop for _, stop in packed)]
    assert packed == list(pairwise(edges))
    positions = compile_mask(tree).position_ids[0].numpy()
    for start, stop, first, last, _, size in found:
        assert stop - start == last - first == size
        np.testing.assert_array_equal(positions[start:stop], np.arange(first, last))


def test_paint_changes_the_dots_alone(tokenizer):
    _, cut = labelled(SUMS, tokenizer)
    plain = tree_lines(cut, tokenizer.decode, width=80)
    painted = tree_lines(cut, tokenizer.decode, width=80, paint=lambda dot, kind: f"{{{kind}}}")
    assert [re.sub(r"\{\w+\}", "●", line) for line in painted] == plain
    assert "├─{thinking} thinking" in painted[2]


def test_lines_are_no_wider_than_the_terminal():
    assert shorten("one\ttwo", 9) == "one\\ttwo"
    assert shorten("one\ttwo", 7) == "one\\tt…"
    assert shorten("東京都", 6) == "東京都"
    assert shorten("東京都", 5) == "東京…"
    assert shorten("\x1b[31mred", 40) == "\\x1b[31mred"
    assert shorten("text", 0) == ""


@given(segment_trees(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_tile_counts_equal_brute_force_in_any_order(tree, block, random):
    order, ready = [], [i for i, s in enumerate(tree.segments) if s.parent is None]
    while ready:
        order.append(ready.pop(random.randrange(len(ready))))
        ready += [i for i, s in enumerate(tree.segments) if s.parent == order[-1]]
    packed = packed_index(tree)
    stops = np.cumsum(tree.lengths)
    places = [packed[stops[s] - tree.lengths[s] : stops[s]] for s in order]
    dense = ancestry(tree)[np.ix_(*[np.concatenate(places)] * 2)]
    edges = np.arange(0, tree.num_tokens, block)
    expected = np.add.reduceat(np.add.reduceat(dense.astype(int), edges, 0), edges, 1)
    counts = tile_counts(tree, order, block)
    np.testing.assert_array_equal(counts, expected)
    keys = set(order[::2])
    others = tile_counts(tree, order, block, keys=set(order) - keys)
    np.testing.assert_array_equal(tile_counts(tree, order, block, keys=keys) + others, counts)


@pytest.mark.parametrize("turns", [[(7, 5, 3)] * 4, [(7, 5, 3), (4, 0, 6), (2, 9, 1), (3, 0, 2)]])
def test_the_papers_order_puts_history_before_the_trained_response(turns):
    tree = PrefixTree.from_turns(turns)
    order = [*range(len(tree.segments))]  # of the tree: the trained response, then its copy
    for index, segment in enumerate(tree.segments):
        if segment.kind == "history":
            order[index - 1], order[index] = index, index - 1
    assert papers_order(tree) == order


@pytest.mark.parametrize("index", [0, 54, 197])
def test_the_papers_order_goes_turn_by_turn(index, tokenizer):
    tree, cut = labelled(shipped(index), tokenizer)
    order = papers_order(cut)
    place = {segment: at for at, segment in enumerate(order)}
    assert sorted(order) == list(range(len(cut.segments)))
    for segment, parent in enumerate(s.parent for s in cut.segments):
        assert parent is None or place[parent] < place[segment]
    ends = [place[leaf.segment] for leaf in cut.leaves]
    assert ends == sorted(ends)
    heavy_first = lay_out(cut).order.tolist()
    assert density(cut, heavy_first) == pytest.approx(compile_mask(tree).density())
    assert density(cut, order) < density(cut, heavy_first)


def test_compare_names_both_densities(capsys):
    assert run("show", "--index", 197, "--compare", "paper") == 0
    densities = re.findall(r"^density (\d\.\d+)", capsys.readouterr().out, re.MULTILINE)
    assert len(densities) == 2
    assert float(densities[0]) > 1.3 * float(densities[1])


def test_pictures_are_written_whole(sums, tmp_path, capsys):
    begin = {"png": b"\x89PNG", "SVG": b"<?xml", "svg": b"<?xml"}
    for ending, magic in begin.items():
        output = tmp_path / f"row.{ending}"
        assert run("show", sums, "--tokenizer", TOKENIZER_PATH, "--output", output) == 0
        assert output.read_bytes().startswith(magic)
        assert output.stat().st_size > 5000
        assert f"written: {output}" in capsys.readouterr().out
    assert (tmp_path / "row.svg").read_bytes() == (tmp_path / "row.SVG").read_bytes()
    assert len(list(tmp_path.iterdir())) == 1 + len(begin)


def test_a_picture_names_its_kinds_samples_and_density(sums, tmp_path, monkeypatch):
    from matplotlib import rcParams

    monkeypatch.setitem(rcParams, "svg.fonttype", "none")
    output = tmp_path / "row.svg"
    assert (
        run("show", sums, "--tokenizer", TOKENIZER_PATH, "--compare", "paper", "--output", output)
        == 0
    )
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", output.read_text())
    assert {"context", "thinking", "response", "trained", "message 1", "message 3"} <= set(texts)
    assert "tool" not in texts
    assert {
        "heavy-first order (largest branch first): density 0.041",
        "the paper's order (turn by turn): density 0.041",
    } <= {text.replace("&#x27;", "'") for text in texts}


def test_a_tree_of_lengths_can_be_drawn_too(tmp_path):
    tree = PrefixTree.from_turns([(60, 300, 120)] * 3)
    draw_rows([RowPicture(tree, lay_out(tree).order, "lengths")], tmp_path / "row.png")
    assert (tmp_path / "row.png").stat().st_size > 5000


def test_a_thought_without_an_answer_is_thinking(tokenizer):
    record = [SUMS[0], {"role": "assistant", "reasoning_content": "Hm.", "content": ""}]
    assert [kind for kind, _, _ in runs_of(labelled(record, tokenizer)[1], tokenizer)] == [
        "context",
        "thinking",
    ]


def test_a_budget_splits_the_row(tmp_path, capsys):
    output = tmp_path / "rows.png"
    assert run("show", "--index", 197, "--max_tokens", 2000, "--output", output) == 0
    sizes = re.findall(r"^row \d of 3: ([\d,]+) tokens", capsys.readouterr().out, re.MULTILINE)
    assert len(sizes) == 3
    assert all(int(size.replace(",", "")) <= 2000 for size in sizes)


ERRORS = {
    "no tokenizer": (["DATA"], "sums.jsonl: needs the tokenizer.* with --tokenizer"),
    "no file": (["none.jsonl", "--tokenizer", "T"], "none.jsonl: no such file"),
    "no conversation": (
        ["--index", "400"],
        r"has 400 conversations; --index must be in \[0, 400\)",
    ),
    "negative": (["--index", "-1"], "--index must be at least 0, got -1"),
    "other ending": (["--output", "row.pdf"], "row.pdf: must end in .png or .svg"),
    "no ending": (["--output", "row"], "row: must end in .png or .svg"),
    "no folder": (["--output", "none/row.png"], "none/row.png: no such folder"),
    "a folder": (["--output", "folder.png"], "folder.png: is a folder"),
    "no budget": (["--max_tokens", "0"], "--max_tokens must be at least 1, got 0"),
    "small budget": (["--max_tokens", "99"], "the sample of message .* raise --max_tokens"),
    "many rows": (
        ["--index", "197", "--max_tokens", "1700", "--compare", "paper"],
        "--compare needs the whole conversation in one row, which takes 3,659 tokens",
    ),
    "no template": (["--chat_template", "none.jinja"], "none.jinja: no such file"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_line(arguments, message, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    known = {"DATA": sums.name, "T": str(TOKENIZER_PATH)}
    assert run("show", *(known.get(argument, argument) for argument in arguments)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.match(f"flexmask: error: .*{message}", line)
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "sums.jsonl"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_picture_leaves_the_old_one(error, sums, tmp_path, monkeypatch, capsys):
    def savefig(self, path, **_):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    output = tmp_path / "row.png"
    output.write_bytes(b"old")
    code = run("show", sums, "--tokenizer", TOKENIZER_PATH, "--output", output)
    assert code == (2 if isinstance(error, OSError) else 130)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["row.png", "sums.jsonl"]


def test_the_docs_show_what_the_program_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    assert run("show", "--index", 0) == 0
    assert f"```text\n{capsys.readouterr().out}```" in (ROOT / "docs/cli.md").read_text()


def test_docs_pictures_come_from_their_commands(tmp_path, monkeypatch):
    """With FLEXMASK_WRITE_DOCS the pictures are written anew."""
    pattern = r"^flexmask show (.*--output (docs/images/\S+))"
    found = [re.findall(pattern, path.read_text(), re.MULTILINE) for path in DOCUMENTS]
    commands = {picture: command for matches in found for command, picture in matches}
    assert len(commands) >= 2
    monkeypatch.chdir(ROOT if os.environ.get("FLEXMASK_WRITE_DOCS") else tmp_path)
    Path("docs/images").mkdir(parents=True, exist_ok=True)
    for picture, command in commands.items():
        assert run("show", *shlex.split(command)) == 0
        assert Path(picture).read_bytes()[16:24] == (ROOT / picture).read_bytes()[16:24]  # size
