"""`python -m benchmarks kernels` on tiny rows in Triton's interpreter: every path but the GPU's."""

import json

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from backend_cases import mask_from_depths, random_inputs, windowed
from flexmask_kernels.backward_keys import turn_of
from flexmask_kernels.backward_pass import backward
from flexmask_kernels.configs import KERNELS, Config
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Counters, Inputs, Options
from flexmask_kernels.tuning import forced_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import masks, windows
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import kernel_checks, kernel_methods, kernels
from benchmarks.__main__ import main
from benchmarks.kernel_cost import Shape, kernel_cost
from benchmarks.kernel_parts import OURS, SLOWER
from benchmarks.kernel_report import targets
from benchmarks.kernel_rows import make_row, named_row, row_names
from benchmarks.mask import count_differences
from benchmarks.report import write_report
from benchmarks.subprocess_calls import CallFailedError
from flexmask import PrefixTree, compile_mask
from flexmask.backends import triton as triton_backend
from flexmask.backends import varlen

pytestmark = pytest.mark.interpreted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the results of a whole quick run."""
    path = tmp_path_factory.mktemp("results")
    assert main(["kernels", "--quick", "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def record(folder):
    return json.loads((folder / "kernels-cpu.json").read_text())


def test_every_method_has_a_figure_or_a_reason(record):
    for row in record["rows"]:
        for name in kernel_methods.METHODS:
            assert (
                name in row["left_out"]
                or name in row["tflops"]["backward"]
                or (name in row["tflops"]["forward"] and f"{name}, backward" in row["left_out"])
            )
        assert set(row["tflops"]["backward"]) == {*OURS, "dense", "npass"}
        for ours, kind in SLOWER.items():
            assert set(row[kind]["both"]) == {*OURS, "dense", "npass"} - {ours}
        assert row["left_out"]["flex_tma"] == "USE_TMA needs a Hopper GPU or a newer one"
    assert not record["targets"]
    for tuned in record["details"]["tuning"]["16"].values():
        assert tuned["num_candidates"] == len(tuned["trials"]) == 2
    assert "wrong" not in record


def test_both_modes_were_held_to_the_reference_on_every_row(record):
    names = {check["name"] for check in record["checks"]}
    for row in record["rows"]:
        for mode in OURS:
            assert f"gradient of q, {row['name']}, D 16, {mode}" in names


def test_the_page_shows_what_has_no_figure_and_why(folder, tmp_path):
    page = write_report(folder, tmp_path).read_text()
    assert "## Attention on a GPU" in page
    assert "FlexAttention has no backward pass on CPUs" in page
    assert (tmp_path / "images" / "benchmark-kernels-cpu.png").exists()


def quick_run(folder, *options, code=0):
    """The record of a quick run that ends with `code`."""
    assert main(["kernels", "--quick", "--output", str(folder), *options]) == code
    return json.loads((folder / "kernels-cpu.json").read_text())


def few_parts(monkeypatch, *baselines):
    """One row, nothing is tuned, and these are the baselines that compile nothing."""
    first, *_ = row_names(quick=True)
    monkeypatch.setattr(kernels, "row_names", lambda quick: [first])
    monkeypatch.setattr(kernels.kernel_parts, "tune", lambda *_: {"failure": "no time"})
    monkeypatch.setattr(kernels, "_FIRST", baselines)
    monkeypatch.setattr(kernels, "_LATER", ())


def test_a_wrong_kernel_has_no_figure_and_the_rest_has(tmp_path, monkeypatch, capsys):
    def half(*args, **options):
        *grads, dsinks = backward(*args, **options)
        factor = 1 if options["deterministic"] else 0.5
        return *(factor * grad for grad in grads), dsinks

    few_parts(monkeypatch, "dense")
    monkeypatch.setattr(triton_backend, "backward", half)
    record = quick_run(tmp_path, code=1)
    shown = capsys.readouterr()
    assert "wrong result, without figures: 2 turns to 32, D 16, triton: wrong" in shown.err
    assert "wrong gradient of" in shown.out
    for row in record["rows"]:
        assert "triton" not in row["tflops"]["forward"]
        assert row["left_out"]["triton"].startswith("wrong gradient of q")
        assert {"triton_split", "varlen", "dense"} == set(row["tflops"]["backward"])


def test_without_a_right_mode_nothing_is_compared(tmp_path, monkeypatch):
    few_parts(monkeypatch, "dense")
    for module, name in ((triton_backend, "forward"), (varlen, "plain_forward")):
        right = getattr(module, name)
        wrong = lambda *a, f=right, **options: tuple(x / 2 for x in f(*a, **options))  # noqa: E731
        monkeypatch.setattr(module, name, wrong)
    for row in quick_run(tmp_path, code=1)["rows"]:
        assert row["left_out"]["dense"] == "nothing of ours is right to compare it with"
        assert not row["tflops"]["forward"]


def test_a_part_that_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def call(function, *arguments, limit_s):
        if function.__name__ == "measure" and "npass" in arguments[3]:
            raise CallFailedError("its process ended with code -9")
        return function(*arguments)

    few_parts(monkeypatch, "npass", "dense")
    monkeypatch.setattr(kernels, "call_here", call)
    for row in quick_run(tmp_path)["rows"]:
        assert row["left_out"]["npass"] == "its process ended with code -9"
        assert {"triton", "dense"} <= set(row["tflops"]["backward"])
    assert "its process ended with code -9" in capsys.readouterr().out


def test_a_run_out_of_time_is_recorded_whole_and_another_goes_on_with_it(tmp_path, monkeypatch):
    for row in quick_run(tmp_path, "--limit", "0")["rows"]:
        assert row["cost"]["forward"]["num_partial"] > 0
        assert row["left_out"] == dict.fromkeys(kernel_methods.METHODS, kernels.NOT_REACHED)
    few_parts(monkeypatch, "npass")
    between = quick_run(tmp_path, "--resume")
    monkeypatch.setattr(kernels, "_FIRST", ("npass", "dense"))
    monkeypatch.setattr(kernels.kernel_parts, "check_ours", None)  # is not asked again
    after = quick_run(tmp_path, "--resume")
    for old, new in zip(between["rows"], after["rows"], strict=True):
        assert old["left_out"]["dense"] == kernels.NOT_REACHED
        assert new["elapsed_s"]["forward"]["npass"] == old["elapsed_s"]["forward"]["npass"]
        assert new["tflops"]["backward"].keys() == {*OURS, "npass", "dense"}


def test_a_wrong_baseline_is_left_out_with_the_reason():
    (row, inputs) = tiny_row()
    ours = kernel_checks.first_group(kernel_methods.build_method("dense", row, inputs), row)
    method = kernel_methods.build_method("npass", row, inputs)
    kernel_checks.check_baseline(method, row, ours, [1e-2] * 4)
    wrong = kernel_methods.Method(
        method.inputs, lambda q, k, v: 2 * method.attend(q, k, v), method.index
    )
    with pytest.raises(kernel_methods.LeftOutError, match=r"wrong output: .* from ours"):
        kernel_checks.check_baseline(wrong, row, ours, [1e-2] * 4)


def tiny_row():
    row = make_row("tiny", [PrefixTree.from_turns([(2, 5, 3)] * 3)], 48)
    q, k, v, dout = random_inputs(row.mask, dtype=torch.float32)
    dout[:, :, row.num_used :] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return row, kernel_methods.Inputs(*leaves, dout)


def test_ancestors_in_the_papers_order_are_those_of_the_tree():
    row, _ = tiny_row()
    order, token = row.paper_order, torch.arange(row.mask.shape[1])
    mask_mod = kernel_methods.ancestor_mask(order, row.mask.subtree_end[0][order])
    seen = mask_mod(None, None, token[:, None], token)
    assert torch.equal(seen, row.mask.to_dense()[0][order][:, order])


@pytest.mark.parametrize("num_turns", [1, 3, 9])
def test_block_masks_of_the_baselines_are_those_of_torch(num_turns):
    mask = compile_mask(PrefixTree.from_turns([(20, 50, 30)] * num_turns))
    L = mask.shape[1]
    ours = kernel_methods.make_block_mask(mask.mask_mod, L, torch.device("cpu"))
    theirs = create_block_mask(mask.mask_mod, 1, None, L, L, device="cpu")
    assert count_differences(ours, theirs) == 0


def test_no_baseline_promises_flexattention_that_each_tile_has_a_visible_key(monkeypatch):
    (row, inputs) = tiny_row()
    options = []
    monkeypatch.setattr(kernel_methods, "_flex_method", lambda *given: options.append(given[2]))
    monkeypatch.setattr(kernel_methods, "replace", lambda method, index: method)
    for name in ("flex", "flex_paper"):
        kernel_methods.build_method(name, row, inputs)
    assert options == [{}, {}]  # ROWS_GUARANTEED_SAFE gives NaN: it is of tiles, not of rows


@pytest.mark.parametrize("name", row_names(quick=False))
def test_rows_have_the_length_that_their_name_says(name):
    row = named_row(name)
    assert row.mask.shape[1] == 1024 * int(name.rpartition(" to ")[2].removesuffix("K"))
    assert row.num_used > 0.95 * row.mask.shape[1]
    assert row.is_short == name.startswith("2-6")
    assert sorted(torch.cat(row.samples).unique().tolist()) == list(range(row.num_used))


@settings(max_examples=15)
@given(
    mask=masks(max_rows=2, max_tokens=60),
    limits=windows(),
    tile=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    deterministic=st.booleans(),
)
def test_kernels_visit_the_tiles_that_the_cost_model_counts(mask, limits, tile, deterministic):
    q, k, v, dout = random_inputs(mask, heads=2, kv_heads=1, dtype=torch.float32)
    mask = windowed(mask, **limits)
    inputs = Inputs(q, k, v, mask.subtree_end, mask.window_start)
    counters = Counters(*torch.zeros(3, 2, dtype=torch.int32))
    config = Config(*tile, 1, 1)
    with forced_configs(dict.fromkeys(KERNELS, config)):
        options = Options(0.5)
        out, lse2 = forward(inputs, options, counters=counters)
        backward(dout, inputs, out, lse2, options, deterministic=deterministic, counters=counters)
    counted = {
        "forward": counters.forward,
        "backward_queries": counters.backward_queries,
        "backward_keys" if deterministic else "backward_fused": counters.backward_keys,
    }
    if not deterministic:
        del counted["backward_queries"]
    for kernel, tiles in counted.items():
        shape = Shape(2, 1, 8, 8, 4)
        cost = kernel_cost(kernel, mask, config, shape)
        assert tiles.tolist() == [cost.num_full, cost.num_partial]
        assert cost.num_flops <= cost.num_tile_flops
        assert cost.num_bytes > 0


def test_cost_of_a_single_tile_is_counted_by_hand():
    mask = mask_from_depths([*range(16)])
    shape = Shape(2, 1, 8, 4, 2)
    cost = kernel_cost("forward", mask, Config(16, 16, 1, 1), shape)
    assert (cost.num_full, cost.num_partial) == (0, 2)
    assert cost.num_flops == 2 * 2 * 136 * (8 + 4)
    # q, out, lse of two heads; k and v of one; ends
    assert cost.num_bytes == 16 * (2 * (16 + 8 + 4) + (16 + 8) + 4)
    longer = mask_from_depths([*range(64)])
    cost = kernel_cost("forward", longer, Config(16, 16, 1, 1), shape)
    assert (cost.num_full, cost.num_partial) == (2 * 6, 2 * 4)


def test_the_lowest_figure_is_held_against_a_goal():
    def row(width, rate, slower, *, is_short=False):
        rates, flex = {"triton": {"median": rate}}, {"flex": {"median": slower}}
        faster = flex | {"flex_tma": {"median": slower - 0.1}}
        return {
            "is_short": is_short,
            "head_width": width,
            "tflops": {"forward": rates, "backward": rates},
            "slower": {"forward": faster, "backward": {}, "both": {"flex_paper": {"median": 3.0}}},
            "slower_than_varlen": {"forward": flex, "backward": flex},
        }

    rows = [row(128, 500, 1.5), row(128, 420, 1.4), row(64, 1, 2.0, is_short=True)]
    times_faster = "times faster than FlexAttention"
    assert {target.name: (target.goal, round(target.measured, 3)) for target in targets(rows)} == {
        "TFLOP/s forward, D 128, lowest of the long rows measured": (430, 420),
        "TFLOP/s backward, D 128, lowest of the long rows measured": (330, 420),
        f"{times_faster}, forward, lowest of the long rows measured": (1.2, 1.3),
        f"{times_faster}, forward, lowest of the short rows measured": (1.8, 1.9),
        "times varlen is faster than FlexAttention, forward, lowest of the long rows": (1.2, 1.4),
        "times varlen is faster than FlexAttention, backward, lowest of the long rows": (1.4, 1.4),
        f"{times_faster} on the paper's order, lowest of the rows measured": (2.5, 3.0),
    }


@triton.jit
def turns_kernel(turns_ptr, num_lines, num_splits, num_heads, num_round):
    place = tl.program_id(0)
    rank, head, split = turn_of(place, num_lines, num_splits, num_heads, num_round)
    tl.store(turns_ptr + 3 * place, rank)
    tl.store(turns_ptr + 3 * place + 1, head)
    tl.store(turns_ptr + 3 * place + 2, split)


@given(
    num_lines=st.integers(1, 6),
    num_splits=st.sampled_from([1, 2]),
    num_round=st.integers(1, 7),
)
@settings(max_examples=10)
def test_heads_take_turns_in_rounds_of_lines(num_lines, num_splits, num_round):
    heads = 8
    turns = torch.empty(num_lines * num_splits * heads, 3, dtype=torch.int32)
    turns_kernel[(len(turns),)](turns, num_lines, num_splits, heads, num_round)
    assert len(set(map(tuple, turns.tolist()))) == len(turns), "each program has one turn"
    lines = np.repeat(np.arange(num_lines), num_splits)
    rounds = np.split(lines, range(num_round * num_splits, lines.size, num_round * num_splits))
    assert turns[:, 0].tolist() == np.concatenate([np.tile(r, heads) for r in rounds]).tolist()
