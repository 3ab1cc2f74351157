"""Benchmarks run on tiny shapes, refuse wrong results, and become a page. Nothing is timed here."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import flexmask
from benchmarks import (
    attention_runs,
    exactness,
    forward,
    gpu_step,
    layout,
    mask,
    memory,
    models,
    precise,
    shapes,
    step,
)
from benchmarks.__main__ import main
from benchmarks.cases import CASES, load_case, why_not
from benchmarks.conversations import agent_tree, long_conversations, random_samples, scaled_turns
from benchmarks.peak import Peak, measure_peak
from benchmarks.record import Check, Measurement, Target
from benchmarks.report import write_report
from benchmarks.tables import Table, describe_machine, describe_settings
from benchmarks.timing import Task, alternate, ratios, spread

HERE = [case for case in CASES if why_not(case, quick=True) is None]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with the quick results of every case."""
    folder = tmp_path_factory.mktemp("results")
    for case in HERE:
        assert main([case, "--quick", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("case", HERE)
def test_quick_run_writes_complete_json(case, results):
    record = json.loads((results / f"{case}-cpu.json").read_text())
    assert record["case"] == case
    assert record["is_quick"]
    assert record["command"] == f"python -m benchmarks {case} --quick"
    assert record["rows"]
    assert record["checks"]
    assert all(check["value"] <= check["bound"] for check in record["checks"])
    environment = record["environment"]
    assert environment["cpu"]
    assert environment["num_threads"] == torch.get_num_threads()
    assert environment["versions"]["torch"] == torch.__version__
    assert not list(results.glob("*.partial"))


def test_report_shows_every_case_with_its_tables_and_plots(results, tmp_path):
    page = write_report(results, tmp_path).read_text()
    for case in HERE:
        module = load_case(case)
        assert f"## {module.TITLE}" in page
        if hasattr(module, "draw"):
            name = f"images/benchmark-{case}-cpu.png"
            assert f"]({name})" in page
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in page


def test_steps_on_a_gpu_need_npass_and_a_run_goes_on_with_what_is_there(tmp_path, monkeypatch):
    def quick_run():
        assert main(["gpu_step", "--quick", "--resume", "--output", str(tmp_path)]) == 0
        return json.loads((tmp_path / "gpu_step-cpu.json").read_text())

    first = quick_run()
    monkeypatch.setattr(gpu_step, "run_step", fail_to_compile)
    again = quick_run()
    assert again["checks"] == first["checks"]
    assert again["rows"] == first["rows"]
    (tmp_path / "gpu_step-cpu.json").unlink()
    (row,) = quick_run()["rows"]
    assert row["left_out"].pop("npass") == "RuntimeError: No working C++ compiler found"
    assert set(row["left_out"].values()) == {"N-pass did not run, so there is no bound"}


def test_report_without_results_says_what_to_run(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert "run `python -m benchmarks all --record` first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def all_visible(trees):
    """A mask that is plain causal, whatever the tree."""
    L = flexmask.compile_mask(trees).shape[1]
    return flexmask.TreeMask(torch.full((1, L), L), torch.arange(L))


single_pass_batches = models.single_pass_batches


def causal_batches(conversations):
    batches = single_pass_batches(conversations)
    for batch in batches:
        batch["subtree_end"][:] = batch["subtree_end"].shape[1]
        batch["position_ids"][:] = torch.arange(batch["position_ids"].shape[1])
    return batches


def uneven_peak(prepare, method, num_tokens):
    return Peak([1.0, 2.0 if method == "cpu" else 2.1], 2**20)


def doubled(q, k, v, mask, **options):
    return 2 * flexmask.attention(q, k, v, mask, **options)


def with_flex(result):
    """Attention whose `flex` backend gives `result(out)` of the right output."""

    def attend(q, k, v, mask, *, backend):
        out = flexmask.attention(q, k, v, mask, backend="cpu")
        return result(out) if backend == "flex" else out

    return attend


doubled_flex = with_flex(lambda out: 2 * out)


def fail_to_compile(*_):
    raise RuntimeError("No working C++ compiler found\nand many lines more")


def doubled_sum(case, results):
    return [2 * x for x in attention_runs.joined(case, results)]


@pytest.mark.parametrize(
    ("case", "place", "name", "wrong", "message"),
    [
        ("mask", mask, "compile_mask", all_visible, "visible pairs, 500 tokens"),
        ("mask", mask, "count_differences", lambda a, b: 3, "blocks that differ, 500 tokens"),
        ("attention", attention_runs, "compile_mask", all_visible, "output, 2 turns, against fp64"),
        ("attention", attention_runs, "attention", doubled, "output, 2 turns, against fp64"),
        ("attention", forward, "attention", doubled_flex, "output, 2 turns, forward only, flex"),
        ("shapes", attention_runs, "compile_mask", all_visible, "visible pairs, 1 to 2 turns"),
        ("shapes", attention_runs, "attention", doubled, "output, 1 to 2 turns, size 1"),
        ("shapes", shapes, "joined", doubled_sum, "output, agents, 10 messages, size 10, against"),
        ("exactness", models, "single_pass_batches", causal_batches, "loss, 3 turns"),
        ("step", models, "single_pass_batches", causal_batches, "loss, single_pass against N-pass"),
        ("memory", memory, "measure_peak", uneven_peak, "attention, 256 tokens, cpu against dense"),
        ("layout", layout, "compile_mask", all_visible, "visited tiles, 3 turns"),
    ],
)
def test_wrong_results_are_refused(
    case, place, name, wrong, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(place, name, wrong)
    assert main([case, "--quick", "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert f"{case}: wrong result, nothing reported: {message}" in error
    assert "must be at most" in error


def test_flexattention_that_does_not_compile_is_left_out_with_the_reason(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(forward, "attention", with_flex(fail_to_compile))
    assert main(["attention", "--quick", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "attention-cpu.json").read_text())
    reason = "RuntimeError: No working C++ compiler found"
    assert record["settings"]["flex_left_out"] == reason
    assert sorted(record["rows"][0]["forward"]["elapsed_s"]) == ["causal", "cpu", "dense"]
    shown = capsys.readouterr().out
    assert f"flex left out {reason}\n" in shown
    assert "Forward only" in shown


def test_attention_results_without_a_forward_pass_still_have_tables():
    assert forward.forward_table([{"num_turns": 2}]) == []


def test_machine_and_settings_are_printed_in_plain_words():
    environment = {"cpu": "AMD EPYC, avx512f", "num_threads": 2}
    environment["versions"] = {"flexmask": "0.1.0", "torch": "2.13.0+cpu", "transformers": None}
    line = "AMD EPYC, avx512f, 2 threads; flexmask 0.1.0, torch 2.13.0+cpu"
    assert describe_machine(environment) == line
    assert "avx512f, 1 thread;" in describe_machine(environment | {"num_threads": 1})
    settings = {"turn": (60, 300, 120), "num_parameters": 1_234_567, "dtype": "float32"}
    assert describe_settings(settings) == "turn 60/300/120, num parameters 1,234,567, dtype float32"


def test_a_differing_block_is_counted():
    tree, other = (flexmask.PrefixTree.from_turns([(9, 40, 9)] * n) for n in (4, 4))
    a = flexmask.compile_mask(tree).to_block_mask(16)
    assert mask.count_differences(a, flexmask.compile_mask(other).to_block_mask(16)) == 0
    assert mask.count_differences(a, all_visible(tree).to_block_mask(16)) > 0


def test_nan_is_refused():
    measurement = Measurement(settings={})
    with pytest.raises(Exception, match="must be at most 1, got nan"):
        measurement.check("error", float("nan"), 1.0)


@pytest.mark.parametrize(("measured", "is_reached"), [(0.9, False), (1.0, True), (1.1, True)])
def test_targets_include_their_goal(measured, is_reached):
    assert Target("at least", 1.0, measured).is_reached is is_reached
    assert Target("at most", 1.0, measured, is_most=True).is_reached is (measured <= 1.0)


def test_tasks_take_turns_and_are_prepared_outside_the_timing():
    calls = []

    def task(name, rounds=None):
        return Task(lambda x: calls.append(x * 30_000_000), lambda: (name,), rounds)

    took = alternate({"a": task("a"), "b": task("b", rounds=1)}, rounds=2, label="")
    assert [len(took[name]) for name in "ab"] == [2, 1]
    firsts = [call[0] for i, call in enumerate(calls) if i == 0 or call[0] != calls[i - 1][0]]
    assert firsts == ["a", "b", "a"]


def test_ratios_are_taken_round_by_round():
    assert ratios([4.0, 9.0, 1.0], [2.0, 3.0]) == [2.0, 3.0]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "num_rounds": 3}


@pytest.mark.parametrize("num_tokens", [256, 1000, 9480, 16_384, 20_001])
def test_long_conversations_have_the_length_asked_for(num_tokens):
    trees = long_conversations(num_tokens)
    assert sum(tree.num_tokens for tree in trees) == num_tokens
    assert all(len(tree.leaves) == 16 for tree in trees)


def test_random_samples_merge_into_the_tree_of_their_lengths():
    turns = scaled_turns(700)
    tree = flexmask.build_tree(random_samples(turns, vocab_size=10**6, seed=0))
    assert tree.num_tokens == 700


def rendered_agent(turns, rng):
    """The samples of an agent's conversation, as a chat template that drops reasoning has them."""
    samples, history = [], np.empty(0, np.int64)
    for turn in turns:
        prompt = np.concatenate((history, rng.integers(10**6, size=turn.user)))
        kept, history = prompt, prompt
        for message in turn.messages:
            reasoning, text, result = (rng.integers(10**6, size=length) for length in message)
            ids = np.concatenate((kept, reasoning, text))
            samples.append(flexmask.Sample(ids, np.arange(ids.size) >= kept.size))
            kept = np.concatenate((ids, result))
            history = np.concatenate((history, text, result))
    return samples


@pytest.mark.parametrize("num_messages", [1, 10, 23])
def test_an_agent_tree_is_the_tree_of_its_rendered_samples(num_messages):
    turns = shapes.agent_turns(num_messages, 5)
    tree = agent_tree(turns)
    samples = rendered_agent(turns, np.random.default_rng(0))
    assert [tree.sample_length(leaf) for leaf in tree.leaves] == [len(s) for s in samples]
    assert len(samples) == num_messages
    built = flexmask.compile_mask(flexmask.build_tree(samples))
    torch.testing.assert_close(flexmask.compile_mask(tree).subtree_end, built.subtree_end)


def test_the_lengths_of_a_kind_are_the_same_every_time():
    assert shapes.agent_turns(12) == shapes.agent_turns(12)
    assert shapes.turns_tree(5).segments == shapes.turns_tree(5).segments


@pytest.mark.parametrize("name", ["paper's order", "light first", "heavy first"])
def test_orders_hold_every_segment_once(name):
    tree = flexmask.PrefixTree.from_turns([(3, 0, 2), (3, 4, 2), (1, 2, 3)])
    order = layout.segment_orders(tree)[name]
    assert sorted(order) == list(range(len(tree.segments)))


def test_precise_attention_equals_autograd():
    generator = torch.Generator().manual_seed(0)
    dense = flexmask.compile_mask(flexmask.PrefixTree.from_turns([(3, 5, 4)] * 2)).to_dense()[0]
    shape = (4, len(dense), 8)
    *qkv, dout = torch.randn(shape, dtype=torch.float64, generator=generator)
    leaves = [x.clone().requires_grad_() for x in qkv]
    heads = [x[None, None] for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=dense)[0, 0]
    expected = (out, *torch.autograd.grad(out, leaves, dout))
    results = precise.attend_precisely(*qkv, dout, dense.__getitem__)
    torch.testing.assert_close(results, expected)


def test_flops_of_a_single_token_are_six_a_parameter():
    model = models.random_llama(models.TINY)
    linear = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    flops = step.count_flops(model, num_tokens=1, num_pairs=0, num_head_positions=1)
    assert flops == 6 * linear
    more = step.count_flops(model, num_tokens=1, num_pairs=1, num_head_positions=1) - flops
    assert more == 12 * 32 * 2  # width and layers


def test_fp64_llama_computes_nothing_in_fp32():
    model, dtypes = models.in_fp64(models.random_llama(models.TINY)), set()

    def note(module, inputs, out):
        outputs = out if isinstance(out, tuple) else (out,)
        dtypes.update(x.dtype for x in outputs if torch.is_tensor(x))

    for module in model.modules():
        module.register_forward_hook(note)
    ids = torch.arange(7)[None]
    precise_logits = model(input_ids=ids).logits
    assert dtypes == {torch.float64}
    usual_logits = models.random_llama(models.TINY)(input_ids=ids).logits
    torch.testing.assert_close(usual_logits.double(), precise_logits, rtol=1e-4, atol=1e-5)


def hold_a_hundred_mebibytes():
    return lambda: int(torch.ones(100 * 2**18).sum())


def test_peak_is_what_the_function_itself_holds():
    kept = torch.ones(200 * 2**18)  # the parent's memory does not count
    peak = measure_peak(hold_a_hundred_mebibytes)
    assert peak.value == 100 * 2**18
    assert 100 <= peak.num_bytes / 2**20 < 130
    assert kept.numel()


def test_tables_are_aligned_markdown():
    table = Table("heading", ("name", "value"), [("a", "1"), ("long name", "1,000")])
    assert str(table).splitlines() == [
        "| name      | value |",
        "| --------- | ----: |",
        "| a         |     1 |",
        "| long name | 1,000 |",
    ]


@pytest.mark.skipif(why_not("kernels", quick=False) is None, reason="has a CUDA device")
def test_a_case_that_cannot_run_here_says_why(capsys):
    assert main(["kernels"]) == 2
    assert "kernels: needs a CUDA device; --quick tries it out" in capsys.readouterr().err


def test_results_of_the_docs_are_replaced_only_where_asked_for(tmp_path, monkeypatch, capsys):
    measured = Measurement({}, [Check("one", 0, 1)], [{"number": 1}])
    case = SimpleNamespace(TITLE="One", measure=lambda quick: measured, tables=lambda record: [])
    monkeypatch.setattr("benchmarks.__main__.load_case", lambda name: case)
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    assert main(["layout"]) == 0
    assert not list(tmp_path.iterdir())
    assert main(["layout", "--record"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["layout-cpu.json"]
    for options, reason in (
        (["layout", "--quick", "--record"], "not allowed with"),
        (["kernels", "--resume"], "name its folder by --output"),
    ):
        with pytest.raises(SystemExit):
            main(options)
        assert reason in capsys.readouterr().err


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["nonsense"])
    assert stopped.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_exactness_knows_the_issue_bounds():
    assert exactness._BOUNDS == {"float64": (1e-10, 1e-10), "float32": (1e-6, 1e-5)}
