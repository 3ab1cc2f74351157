"""`flexmask plan`: its numbers against brute force and hand counts, and what it refuses."""

import gc
import json
import math
import re
import tracemalloc
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_cases import chat_case
from chat_tokenizer import chat_tokenizer, marking_tokenizer
from command_cases import run, write_config, write_conversations
from hypothesis import given
from hypothesis import strategies as st
from model_cases import supported, tiny_model
from strategies import random_samples
from transformers import LlamaConfig

from flexmask import Sample, build_tree, compile_mask, pack, patch, render_samples
from flexmask.data.files import read_conversations
from flexmask.data.messages import Conversation, parse_conversation
from flexmask.data.renderer import Rendered, Renderer
from flexmask.demo import CONFIG_PATH, DATA_PATH, TOKENIZER_PATH
from flexmask.errors import UnsupportedModelError
from flexmask.model.cost import CostModel
from flexmask.model.load import meta_model
from flexmask.model.windows import FULL, Window
from flexmask.model.work import Work, npass_work, single_pass_work
from flexmask.tools.plan.memory import saved_bytes, saved_bytes_per_token
from flexmask.tools.plan.mistraining import count_mistrained
from flexmask.tools.plan.row_budget import RowBudget
from flexmask.tools.plan.survey import distribution, make_plan
from flexmask.tree.oracle import ancestry
from flexmask.tree.tree import PrefixTree

NUM_CONVERSATIONS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    return write_conversations(path, NUM_CONVERSATIONS)


@pytest.fixture(scope="module")
def rendered(data, tokenizer):
    return [render_samples(chat, tokenizer) for chat in read_conversations(data)]


@pytest.fixture(scope="module")
def plan(data, tokenizer):
    return make_plan([data], Renderer(tokenizer))


def trie_depths(samples):
    """The depth of each node of a plain trie of token ids."""
    root, depths = {}, []
    for sample in samples:
        node = root
        for depth, token in enumerate(sample.input_ids.tolist()):
            if token not in node:
                node[token] = {}
                depths.append(depth)
            node = node[token]
    return depths


def test_counts_equal_brute_force(plan, rendered):
    samples = [sample for conversation in rendered for sample in conversation]
    depths = [depth for conversation in rendered for depth in trie_depths(conversation)]
    assert (plan.conversations, plan.samples) == (NUM_CONVERSATIONS, len(samples))
    assert plan.trained_tokens == sum(int(sample.loss_weights.sum()) for sample in samples)
    assert plan.npass.work.num_tokens == sum(len(sample.input_ids) for sample in samples)
    assert plan.npass.work.num_pairs == sum(i + 1 for s in samples for i in range(len(s)))
    assert plan.single_pass.work.num_tokens == len(depths)
    assert plan.single_pass.work.num_pairs == sum(depth + 1 for depth in depths)
    assert plan.token_ratio == plan.npass.work.num_tokens / len(depths)
    assert plan.one_render.work == npass_work(len(samples[-1]) for samples in rendered)


def test_lengths_equal_brute_force(plan, rendered):
    lengths = [len(sample) for conversation in rendered for sample in conversation]
    totals = [sum(map(len, conversation)) for conversation in rendered]
    sizes = [len(trie_depths(conversation)) for conversation in rendered]
    assert plan.turns.tolist() == list(map(len, rendered))
    assert plan.sample_tokens.tolist() == lengths
    assert plan.conversation_tokens.tolist() == sizes
    last = [len(conversation[-1]) for conversation in rendered]
    assert list(plan.largest.values()) == [max(lengths), max(totals), max(last), max(sizes)]


def test_tiles_equal_brute_force(rendered, tokenizer, tmp_path):
    path = write_conversations(tmp_path / "few.jsonl", 3)
    few = make_plan([path], Renderer(tokenizer))
    visited, npass = 0, 0
    for conversation in rendered[:3]:
        dense = ancestry(build_tree(conversation))
        blocks = range(0, len(dense), 128)
        visited += sum(dense[i : i + 128, j : j + 128].any() for i in blocks for j in blocks)
        for sample in conversation:
            blocks = math.ceil(len(sample) / 128)
            npass += sum(1 for i in range(blocks) for j in range(i + 1))
    assert few.single_pass.num_tiles() == visited
    assert few.npass.num_tiles() == npass
    assert few.single_pass.tile_density == few.single_pass.work.num_pairs / (visited * 128**2)


def test_tile_density_is_that_of_the_mask(rendered, tokenizer, data, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(data.read_text().splitlines(keepends=True)[1])
    mask = compile_mask(build_tree(rendered[1]))
    assert make_plan([path], Renderer(tokenizer)).single_pass.tile_density == mask.density(128)


def turns_of(*turns, tools=False):
    """A conversation from (question, thinking, answer)."""
    messages = []
    for question, thinking, answer in turns:
        messages.append({"role": "tool" if tools and messages else "user", "content": question})
        message = {"role": "assistant", "content": answer}
        messages.append(message | ({"reasoning_content": thinking} if thinking else {}))
    return parse_conversation(messages)


def mistrained(conversation, tokenizer):
    samples = render_samples(conversation, tokenizer)
    return count_mistrained(conversation, samples, tokenizer)


def test_mistrained_tokens_equal_a_hand_count(tokenizer):
    conversation = turns_of(
        ("2 + 2?", "Two and two.", "4"), ("And plus 1?", None, "5"), ("And plus 1?", "So.", "6")
    )
    counts = mistrained(conversation, tokenizer)
    # the tokens of the shipped tokenizer
    thinking = ["<think>", "\n", "T", "w", "o", " and", " two", "."]
    after = ["\n", "</think>", "\n", "\n", "4", "<|im_end|>"]
    first = tokenizer.encode("<think>\nTwo and two.\n</think>\n\n4<|im_end|>")
    assert [tokenizer.decode([token]) for token in first] == thinking + after
    assert counts.one_render_never_trained == 8
    assert counts.one_render_wrong_context == 6
    second = len(tokenizer.encode("5<|im_end|>"))
    third = len(tokenizer.encode("<think>\nSo.\n</think>\n\n6<|im_end|>"))
    assert counts.thinking_in_history == second + third
    assert counts.no_thinking_no_loss == second == 2
    assert counts.no_thinking_turns == 1
    assert counts.first_response_token == 2
    assert counts.conversations_with_tool_messages == 0


@pytest.mark.filterwarnings("ignore:the chat template opens the thinking")
def test_tokens_of_thinking_are_the_same_where_a_tokenizer_marks_the_beginning_of_a_text():
    conversation = parse_conversation(chat_case("thinking")[0])
    plain, marking = (
        mistrained(conversation, make("deepseek_r1_distill"))
        for make in (chat_tokenizer, marking_tokenizer)
    )
    assert plain.one_render_never_trained == marking.one_render_never_trained > 0


def test_a_single_turn_is_only_wrong_in_the_papers_first_token(tokenizer):
    counts = mistrained(turns_of(("2 + 2?", "Two and two.", "4")), tokenizer)
    assert {name for name, count in asdict(counts).items() if count} == {"first_response_token"}


def test_thinking_that_lasts_through_tool_calls_is_no_mistake(tokenizer):
    conversation = turns_of(("2 + 2?", "Call.", "wait"), ("four", "So.", "4"), tools=True)
    counts = mistrained(conversation, tokenizer)
    assert counts.one_render_never_trained == counts.one_render_wrong_context == 0
    assert counts.thinking_in_history == 0
    assert counts.conversations_with_tool_messages == 1


def test_conversations_without_thinking_are_right_but_for_the_papers_code(tokenizer):
    counts = mistrained(turns_of(("2 + 2?", None, "4"), ("plus 1?", None, "5")), tokenizer)
    assert counts.no_thinking_no_loss == 4
    assert sum(asdict(counts).values()) == 4 + 2  # the tokens, and the turns


def test_one_render_equals_brute_force(plan, rendered):
    wrong = 0
    for samples in rendered:
        last = samples[-1].input_ids.tolist()
        for sample in samples:
            ids = sample.input_ids.tolist()
            trained = [i for i, weight in enumerate(sample.loss_weights) if weight]
            wrong += sum(ids[: i + 1] != last[: i + 1] for i in trained)
    counts = plan.mistrained
    assert counts.one_render_never_trained + counts.one_render_wrong_context == wrong


@pytest.mark.parametrize("case", ["thinking", "thinking+tools"])
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "glm4moe", "gptoss", "qwen3", "qwen3_8"])
@pytest.mark.filterwarnings("ignore:the chat template")
def test_thinking_is_found_in_what_real_templates_write(name, case):
    if (name, case) == ("deepseek_r1_distill", "thinking+tools"):
        return  # refused: the template has no tools
    messages, tools = chat_case(case)
    conversation = parse_conversation({"messages": messages, "tools": tools})
    tokenizer = chat_tokenizer(name)
    samples = render_samples(conversation, tokenizer)
    counts = count_mistrained(conversation, samples, tokenizer)
    assert counts.first_response_token == len(samples)
    if name == "qwen3_8":  # keeps all thinking
        assert counts.one_render_never_trained == counts.thinking_in_history == 0
    else:
        assert counts.thinking_in_history == samples[-1].num_trained
        texts = [messages[sample.key]["reasoning_content"] for sample in samples[:-1]]
        thinking = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        assert thinking <= counts.one_render_never_trained <= thinking + 10 * len(texts)


def test_mistrained_tokens_are_never_more_than_are_trained(plan):
    counts = plan.mistrained
    lost = counts.one_render_never_trained + counts.one_render_wrong_context
    for tokens in (lost, counts.thinking_in_history, counts.no_thinking_no_loss):
        assert 0 < tokens < plan.trained_tokens


@pytest.mark.parametrize("max_tokens", [60, 300, 700, 10_000])
def test_overflow_equals_what_pack_does(data, tokenizer, rendered, max_tokens):
    overflow = make_plan([data], Renderer(tokenizer), max_tokens=max_tokens).overflow
    trees = [build_tree(samples) for samples in rendered]
    rows, dropped = [], 0
    for tree in trees:
        if max_tokens < min(map(tree.sample_length, tree.leaves)):
            dropped += len(tree.leaves)
            continue
        packed = pack([tree], max_tokens, on_overflow="drop")
        rows.extend(packed)
        dropped += len(packed.dropped)
    assert overflow.split.dropped_samples == dropped
    assert overflow.tokens == sum(map(len, rows))
    assert overflow.split.trees == sum(tree.num_tokens > max_tokens for tree in trees)
    kept = [s for samples in rendered for s in samples if len(s) <= max_tokens]
    lost = [s for samples in rendered for s in samples if len(s) > max_tokens]
    assert overflow.npass_tokens == sum(map(len, kept))
    assert overflow.dropped_trained_tokens == sum(s.num_trained for s in lost)
    firsts = [np.count_nonzero(s.loss_weights[1:max_tokens]) for s in lost]
    assert overflow.truncated_trained_tokens == sum(firsts)
    fitting = [[s for s in samples if len(s) <= max_tokens] for samples in rendered]
    distinct = sum(len(trie_depths(samples)) for samples in fitting)
    assert overflow.split.repeated_tokens == overflow.tokens - distinct


def test_nothing_of_a_conversation_is_kept(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "many.jsonl"
    messages = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "2"}]
    path.write_text((json.dumps({"messages": messages}) + "\n" + "{\n") * 2000)
    rng = np.random.default_rng(0)

    def render(renderer, conversation):
        ids = rng.integers(9, size=rng.integers(2, 60))
        return Rendered(conversation, [Sample(ids, np.arange(ids.size) > 0, 1)], 0, ())

    monkeypatch.setattr(Renderer, "render", render)
    kinds = (Sample, Conversation, PrefixTree)
    memory, alive = [], []

    def num_alive():
        gc.collect()
        return sum(type(thing) in kinds for thing in gc.get_objects())

    def watch(items):
        for seen, item in enumerate(items, start=1):
            yield item
            if seen in (1000, 4000):
                alive.append(num_alive())
                memory.append(tracemalloc.get_traced_memory()[0])

    before = num_alive()
    tracemalloc.start()
    plan = make_plan([path], Renderer(tokenizer), on_bad_line="skip", progress=watch)
    tracemalloc.stop()
    assert plan.conversations == plan.num_bad_lines == 2000
    assert len(plan.bad_lines) == 20
    assert memory[1] - memory[0] < 50_000  # of 1,500 conversations and as many bad lines
    assert max(alive) <= before + 3


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=50))
def test_bins_of_a_distribution_hold_their_values(values):
    figures = distribution(values)
    assert sum(count for *_, count in figures["bins"]) == len(values)
    assert 1 <= len(figures["bins"]) <= 64
    for start, stop, count in figures["bins"]:
        assert count == sum(start <= value < stop for value in values)
    assert figures["mean"] == pytest.approx(np.mean(values))
    assert figures["median"] == sorted(values)[(len(values) - 1) // 2]
    assert sum(value <= figures["p95"] for value in values) >= 0.95 * len(values)


def test_the_bound_of_rows_is_that_of_train():
    """Trees above half a row have rows of their own, though two rows have room for their tokens."""
    budget = RowBudget(1000)
    for key in range(3):
        sample = Sample(list(range(600)), [0] + [1] * 599, key)
        budget.add(build_tree([sample]), [sample])
    rows = pack([build_tree([Sample(list(range(600)), [1] * 600)])] * 3, 1000)
    assert budget.to_json()["fewest_rows"] == len(rows) == 3


def test_cost_model_counts_flops_as_the_benchmark_does():
    from benchmarks.models import TINY, random_llama
    from benchmarks.step import count_flops

    model = random_llama(TINY)
    samples = random_samples(3, num_samples=5)
    for work in (npass_work(map(len, samples)), single_pass_work(build_tree(samples))):
        expected = count_flops(
            model,
            num_tokens=work.num_tokens,
            num_pairs=work.num_pairs,
            num_head_positions=work.num_tokens,
        )
        assert CostModel.of(model).flops(work) == expected


def test_cost_model_is_torchs_own_count_but_for_attention():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("qwen3")
    cost = CostModel.of(model)
    ids = torch.arange(40)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    by_op = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in by_op.items() if "mm" in str(op))
    assert cost.flops(Work(40, 0, dict.fromkeys(cost.windows, 0))) == pytest.approx(
        linear, rel=0.02
    )


def test_cost_model_counts_the_experts_that_a_token_meets():
    model = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(
        p.numel()
        for n, p in model.model.named_parameters()
        if p.ndim == 2 and ".experts." not in n and "embed" not in n
    )
    assert CostModel.of(model).linear == others + experts / 4


def test_cost_model_counts_the_widths_of_latent_attention():
    model = tiny_model("deepseek_v3")
    heads, keys, values = 4, 12, 8
    assert CostModel.of(model).widths == {FULL: 2 * heads * (keys + values) / 2}


@pytest.mark.parametrize("family", supported(["step3p5"]))
def test_cost_model_counts_the_heads_of_each_layer(family):
    widths = CostModel.of(tiny_model(family)).widths  # 8 heads of 8 with a window, 4 without
    assert widths == {Window(window=4): 64, FULL: 32}


def test_predicted_activations_are_what_autograd_keeps():
    model = tiny_model("qwen3", vocab_size=300)
    shapes = meta_model(model.config, torch.float32)
    per_token = saved_bytes_per_token(shapes)
    (row,) = pack([build_tree(random_samples(0, num_samples=9))])
    patch(model, backend="cpu")
    batch = row.to_batch()
    kept = saved_bytes(model, lambda: model(**batch).loss)
    assert per_token * len(row) == pytest.approx(kept, rel=0.15)


def test_counting_what_autograd_keeps_leaves_nothing_behind():
    outputs = []

    def forward():
        output = torch.ones(3, requires_grad=True).exp()  # which its node keeps for the backward
        outputs.append(weakref.ref(output))
        return output

    assert saved_bytes(torch.nn.Identity(), forward) == 12
    assert outputs[0]() is None


def test_the_table_and_the_json_hold_the_same_numbers(data, plan, tmp_path, capsys):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ("--json", file, "--plot", picture, "--max_tokens", 700)
    assert run("plan", data, "--tokenizer", TOKENIZER_PATH, *options) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["conversations"] == NUM_CONVERSATIONS
    assert report["samples"] == plan.samples
    assert report["npass_tokens"] == plan.npass.work.num_tokens
    assert report["single_pass_tokens"] == plan.single_pass.work.num_tokens
    assert report["token_ratio"] == plan.token_ratio
    for number in (report["npass_tokens"], report["single_pass_tokens"], plan.trained_tokens):
        assert f"{number:,}" in out
    assert "what other pipelines would train wrongly" in out
    assert "with rows of at most 700 tokens" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def test_the_docs_show_what_the_command_prints(tmp_path, capsys):
    options = ("--model", CONFIG_PATH.parent, "--max_tokens", 1024)
    assert run("plan", DATA_PATH, "--tokenizer", TOKENIZER_PATH, *options) == 0
    docs = Path(__file__).parent.parent / "docs" / "cli.md"
    assert capsys.readouterr().out.strip() in docs.read_text()


def test_json_names_are_in_the_docs(plan):
    docs = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    assert all(f"`{name}`" in docs for name in plan.to_json())


def test_json_alone_is_all_that_stdout_holds(data, capsys):
    assert run("plan", data, "--tokenizer", TOKENIZER_PATH, "--json") == 0
    assert json.loads(capsys.readouterr().out)["conversations"] == NUM_CONVERSATIONS


def test_predicted_and_measured_stand_side_by_side(tmp_path, capsys):
    few = write_conversations(tmp_path / "few.jsonl", 2, shortest=True)
    write_config(tmp_path, num_hidden_layers=1, hidden_size=32)
    options = ("--model", tmp_path, "--measure", 2, "--json", tmp_path / "plan.json")
    options += ("--sequence_parallel_size", 2)
    assert run("plan", few, "--tokenizer", TOKENIZER_PATH, *options) == 0
    out, err = capsys.readouterr()
    assert "3 rounds" in out[out.index("estimate for") :]
    assert re.search(r"measuring: at least [0-9.]+ GiB and \d+ s on cpu", err)
    report = json.loads((tmp_path / "plan.json").read_text())
    measured, estimate = report["measured"], report["estimate"]
    length = report["largest_row_tokens"]["single_pass"]
    per_token = estimate["activation_bytes"]["single_pass"] / length
    assert estimate["shared_activation_bytes"] == pytest.approx(per_token * 2 * -(-length // 4))
    assert "of each of 2 processes" in out
    assert measured["npass_tokens"] == report["npass_tokens"]
    assert measured["predicted_speed_up"]["npass"] == pytest.approx(estimate["speed_up"])
    assert measured["measured_speed_up"].keys() == measured["predicted_speed_up"].keys()
    for way, kept in measured["saved_bytes"].items():
        assert measured["predicted_saved_bytes"][way] == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize(("rounds", "code"), [(0, 130), (1, 130), (2, 130), (None, 0)])
def test_rounds_that_were_finished_are_kept(tmp_path, monkeypatch, capsys, rounds, code):
    few = write_conversations(tmp_path / "few.jsonl", 1, shortest=True)
    write_config(tmp_path, num_hidden_layers=1, hidden_size=32)
    times = iter([1.0, 2.0, 3.0] * (rounds or 0))

    def step(*_):
        if rounds is None:
            raise TimeoutError
        try:
            return next(times)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("flexmask.tools.plan.measure._time", step)
    options = ("--tokenizer", TOKENIZER_PATH, "--model", tmp_path, "--measure")
    assert run("plan", few, *options) == code
    out, err = capsys.readouterr()
    assert out.count("estimate for") == 1
    assert ("1 round" in out) == bool(rounds)
    assert ("no round was done in 300 s" in out) == (rounds is None)
    assert ("stopped before a round was measured" in err) == (rounds == 0)


def test_bad_lines_are_skipped_on_request_and_listed(data, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    path.write_text("{\n" + data.read_text().splitlines(keepends=True)[0] + '{"messages": []}\n')
    assert run("plan", path, "--tokenizer", TOKENIZER_PATH, "--on-bad-line", "skip") == 0
    out = capsys.readouterr().out
    assert "2 bad lines skipped" in out
    assert "mixed.jsonl:1: " in out
    assert "mixed.jsonl:3: " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokenizer", "no/such/place"), "no/such/place: no such folder; name a tokenizer's"),
        (("--max_tokens", 0), "--max_tokens must be at least 1, got 0"),
        (("--measure",), "name one with --model"),
        (("--sequence_parallel_size", 2), "shares a model's memory; name it with --model"),
        (("--measure", 0), "--measure must be at least 1, got 0"),
        (("--model", "no/such/place"), "no/such/place: no such folder; name a model's"),
        (("--plot", "no/such/place/plan.png"), "no such folder"),
        (("--plot", "plan.pdf"), "plan.pdf: must end in .png or .svg"),
        (("--json", "."), "is a folder"),
    ],
)
def test_bad_options_are_one_line(data, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run("plan", data, "--tokenizer", TOKENIZER_PATH, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flexmask: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("", "the file is empty"), ("{\n", "bad.jsonl:1: ")],
)
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, capsys, text, message):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    output = tmp_path / "plan.json"
    assert run("plan", path, "--tokenizer", TOKENIZER_PATH, "--json", output) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


def test_a_model_that_cannot_be_patched_is_refused():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.attention_dropout = 0.1
    with pytest.raises(UnsupportedModelError, match="attention_dropout must be 0"):
        CostModel.of(meta_model(config, torch.float32))


def test_such_a_model_is_refused_before_the_data_is_read(tmp_path, capsys):
    write_config(tmp_path, attention_dropout=0.1)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no conversation")
    assert run("plan", bad, "--tokenizer", TOKENIZER_PATH, "--model", tmp_path) == 2
    assert "attention_dropout must be 0" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(data, tmp_path, capsys):
    write_config(tmp_path, vocab_size=50, pad_token_id=None, eos_token_id=None)
    options = ("--model", tmp_path, "--measure", 1)
    assert run("plan", data, "--tokenizer", TOKENIZER_PATH, *options) == 2
    assert "the tokenizer belongs to another model" in capsys.readouterr().err


def test_a_stopped_run_leaves_no_file(data, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexmask.files.json.dumps", stop)
    assert run("plan", data, "--tokenizer", TOKENIZER_PATH, "--json", tmp_path / "plan.json") == 130
    assert not list(tmp_path.iterdir())
