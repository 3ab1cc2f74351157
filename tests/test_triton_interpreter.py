"""The Triton kernels in Triton's interpreter, on CPU tensors, against the fp64 reference."""

import copy
import json
import multiprocessing
from collections import Counter
from functools import wraps
from unittest import mock

import numpy as np
import pytest
import torch
from backend_cases import (
    check_autocast,
    empty_is_nan,
    mask_from_depths,
    random_inputs,
    run,
    run_reference,
    run_triton,
    stack,
    windowed,
    worst_ratio,
)
from flexmask_kernels import autotune as tuner
from flexmask_kernels import backward_pass, planning
from flexmask_kernels import candidates as candidates_module
from flexmask_kernels.arguments import input_precision
from flexmask_kernels.autotune import autotune, compile_ahead
from flexmask_kernels.backward_pass import backward
from flexmask_kernels.candidates import candidates, repeats_work, typical_row
from flexmask_kernels.configs import KERNELS, Config, default_config
from flexmask_kernels.descriptors import fits_tma, walked_tensors
from flexmask_kernels.forward_pass import forward
from flexmask_kernels.inputs import Counters, Inputs, Options
from flexmask_kernels.planning import plan_lines
from flexmask_kernels.tuning import choose_config, forced_configs, save_config
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import masks, windows
from model_cases import largest_error, npass_case, packed, single_pass, tiny_model
from strategies import random_samples
from torch.utils.checkpoint import checkpoint

from flexmask import TreeMask, attention, patch
from flexmask.backends import choose_backend
from flexmask.backends import triton as backend
from flexmask.backends.api import dispatch
from flexmask.backends.cache import _cache

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    with empty_is_nan():
        yield


# a chain, a branch, a deeper branch, another tree, padding: full, partial and empty tiles of 16
CONVERSATION = mask_from_depths([*range(48), *range(36, 50), *range(14, 22), *range(9), 0, 0, 0])
SMALL = mask_from_depths([*range(12), *range(3, 20), 0, 0])
BATCH = stack([CONVERSATION, mask_from_depths([d for n in range(40) for d in (n, n + 1)])])

SHAPES = {  # block_q, block_k
    "square": (16, 16),
    "wide": (16, 32),
    "tall": (32, 16),
    "large": (64, 64),
}
WINDOWS = {"all": {}, "window": {"window": 30}, "chunk": {"chunk": 32}}


def tiles(shape):
    block_q, block_k = SHAPES[shape]
    return forced_configs(dict.fromkeys(KERNELS, Config(block_q, block_k, 4, 2)))


def test_dq_may_be_summed_as_its_transpose():
    inputs = random_inputs(SMALL, heads=2, width=24, value_width=40, dtype=torch.float32)
    with mock.patch.object(backward_pass, "transposes_dq", return_value=True), tiles("wide"):
        ours = run_triton(SMALL, *inputs)
    assert worst_ratio(ours, run_reference(SMALL, *inputs)) < 1


@settings(max_examples=20)
@given(
    mask=masks(max_rows=2, max_tokens=26),
    shape=st.sampled_from(["square", "wide", "tall"]),
    limits=st.one_of(st.just({}), windows()),
    softcap=st.sampled_from([None, None, 1.5]),
    scale=st.sampled_from([None, 0.3]),
    has_sinks=st.booleans(),
    heads=st.sampled_from([(2, 1), (2, 2), (3, 1)]),
    widths=st.sampled_from([(16, 16), (24, 8), (5, 40)]),
    deterministic=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_output_and_gradients_equal_reference(
    mask, shape, limits, softcap, scale, has_sinks, heads, widths, deterministic, dtype
):
    options = {**limits, "softcap": softcap, "scale": scale}
    H, H_kv = heads
    options["sinks"] = torch.linspace(-1, 2, H) if has_sinks else None
    D, D_v = widths
    inputs = random_inputs(mask, heads=H, kv_heads=H_kv, width=D, value_width=D_v, dtype=dtype)
    with tiles(shape):
        ours = run_triton(mask, *inputs, deterministic=deterministic, **options)
    assert worst_ratio(ours[:4], run_reference(mask, *inputs, **options)[:4]) < 1
    if has_sinks:
        exact = run_reference(mask, *inputs, **options)[4]
        eps = torch.finfo(dtype).eps
        assert (ours[4] - exact).abs().max() <= 8 * eps * mask.shape[1] ** 0.5 * max(
            1, exact.abs().max()
        )


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
@pytest.mark.parametrize("limits", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_conversation_equals_reference(shape, limits, deterministic):
    inputs = random_inputs(CONVERSATION, heads=2, kv_heads=1, dtype=torch.float32)
    with tiles(shape):
        ours = run_triton(CONVERSATION, *inputs, deterministic=deterministic, **limits)
    assert worst_ratio(ours, run_reference(CONVERSATION, *inputs, **limits)) < 1


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
def test_descriptors_read_what_pointers_read(deterministic):
    mask = stack([SMALL, SMALL])
    inputs = random_inputs(mask, heads=2, width=24, value_width=40, dtype=torch.float32)
    assert all(fits_tma(x) for x in inputs)
    found = []
    for use_tma in (False, True):
        with forced_configs(dict.fromkeys(KERNELS, Config(16, 32, 4, 2, use_tma))):
            found.append(run_triton(mask, *inputs, window=9, deterministic=deterministic))
    for pointers, descriptors in zip(*found, strict=True):
        assert torch.equal(pointers, descriptors)


def test_tensors_that_do_not_fit_a_descriptor_are_read_by_pointers():
    config = Config(16, 16, 4, 2, use_tma=True)
    x = torch.zeros(1, 8, 2, 8, dtype=torch.float16).transpose(1, 2)
    assert walked_tensors(config, 16, k_ptr=x)["USE_TMA"]
    misfits = {
        "rows of 10 bytes": x.new_zeros(1, 2, 8, 5),
        "a start between units": x.new_zeros(129)[1:].view(1, 2, 8, 8),
        "columns apart": x.new_zeros(1, 2, 8, 16)[..., ::2],
        "one head for all": x[:, :1].expand(-1, 2, -1, -1),
    }
    for name, misfit in misfits.items():
        pair = {"k_ptr": x, "v_ptr": misfit}
        assert walked_tensors(config, 16, **pair) == {"USE_TMA": False, **pair}, name
    inputs = random_inputs(SMALL, width=5, value_width=5, dtype=torch.float16)
    with forced_configs(dict.fromkeys(KERNELS, config)):
        ours = run_triton(SMALL, *inputs)
    assert worst_ratio(ours, run_reference(SMALL, *inputs)) < 1


def eager_attention(q, k, v, mask, *, sinks=None):
    """What a user would write: every step in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask.to_dense().unsqueeze(1), -torch.inf)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
def test_fp16_error_within_twice_eager_error(deterministic):
    shape = {"heads": 2, "kv_heads": 1, "width": 64, "value_width": 64}
    inputs = random_inputs(BATCH, dtype=torch.float16, **shape)
    ours = run_triton(BATCH, *inputs, deterministic=deterministic)
    eager = run(BATCH, *inputs, function=eager_attention)
    for result, theirs, exact in zip(ours, eager, run_reference(BATCH, *inputs), strict=True):
        rounding = torch.finfo(torch.float16).eps * exact.abs().max()
        bound = 2 * (theirs.double() - exact).abs().max() + rounding
        assert (result.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
def test_fp16_gradients_that_overflow_are_not_finite_and_no_other_is_wrong(deterministic):
    """What a loss scaler looks for: infinities where a step is to be left out, as SDPA has them."""
    q, k, v, dout = random_inputs(SMALL, dtype=torch.float16)
    inputs = (q, k, v * 8, dout.clamp(-1, 1) * 2**14)
    ours = run_triton(SMALL, *inputs, deterministic=deterministic)[1:]
    overflowed = False
    for result, exact in zip(ours, run_reference(SMALL, *inputs)[1:], strict=True):
        finite, limits = torch.isfinite(result), torch.finfo(torch.float16)
        assert not finite[exact.abs() > 1.01 * limits.max].any()
        bound = 8 * limits.eps * SMALL.shape[1] ** 0.5 * exact.abs().max()
        assert ((result - exact)[finite].abs() <= bound).all()
        overflowed |= not finite.all()
    assert overflowed


def test_a_wrong_mask_is_noticed():
    inputs = random_inputs(CONVERSATION, dtype=torch.float32)
    wrong = CONVERSATION.subtree_end.clone()
    wrong[0, 3] -= 1  # one pair less
    out = dispatch(*inputs[:3], wrong, backend="triton")
    exact = run_reference(CONVERSATION, *inputs)[:1]
    assert worst_ratio([out], exact) > 100


@pytest.mark.parametrize("limits", [{}, {"window": 9}], ids=["all", "window"])
def test_deterministic_gradients_are_bitwise_equal(limits):
    inputs = random_inputs(SMALL, dtype=torch.float32)
    first, second = (run_triton(SMALL, *inputs, deterministic=True, **limits) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("splits", "num_round"), [(1, 1), (2, 64), (4, 1)])
def test_heads_of_a_group_may_be_split_over_programs_in_any_order(splits, num_round):
    inputs = random_inputs(SMALL, heads=8, kv_heads=2, dtype=torch.float32)
    with (
        mock.patch.object(backward_pass, "num_head_splits", return_value=splits) as asked,
        mock.patch.object(backward_pass, "NUM_ROUND", num_round),  # of the two blocks of keys
    ):
        ours = run_triton(SMALL, *inputs, deterministic=True)
    assert asked.called
    assert worst_ratio(ours, run_reference(SMALL, *inputs)) < 1


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
@pytest.mark.parametrize("shape", SHAPES)
def test_counters_equal_the_tiles(shape, deterministic):
    mask = BATCH if shape == "large" else CONVERSATION
    H, zeros = 2, torch.zeros(3, 2, dtype=torch.int32)
    counters = Counters(*zeros)
    q, k, v, dout = random_inputs(mask, heads=H, kv_heads=1, dtype=torch.float32)
    inputs, options = Inputs(q, k, v, mask.subtree_end), Options(0.5)
    with tiles(shape):
        out, lse2 = forward(inputs, options, counters=counters)
        backward(dout, inputs, out, lse2, options, deterministic=deterministic, counters=counters)
    rows = mask.tiles(*SHAPES[shape])
    full = H * sum(row.num_full for row in rows)
    expected = [full, H * sum(row.num_visited for row in rows) - full]
    assert counters.forward.tolist() == expected
    assert counters.backward_keys.tolist() == expected
    assert counters.backward_queries.tolist() == (expected if deterministic else [0, 0])


@pytest.mark.parametrize("by_key", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("limits", [{}, {"window": 30}], ids=["all", "window"])
def test_a_plan_made_some_lines_at_a_time_is_the_same(limits, by_key):
    mask = windowed(BATCH, **limits) if limits else BATCH
    masks, options = (mask.subtree_end, mask.window_start), {"config": Config(16, 8, 1, 1)}
    whole = plan_lines(*masks, **options, by_key=by_key)
    with mock.patch.object(planning, "_TILES_AT_ONCE", 100):  # tiles; 4 or 9 lines
        for one, other in zip(whole, plan_lines(*masks, **options, by_key=by_key), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("limits", [{"window": 60}, {"chunk": 60}], ids=["window", "chunk"])
def test_a_window_skips_tiles_and_keeps_full_ones(limits):
    mask = windowed(mask_from_depths([*range(200)]), **limits)
    counters = Counters(*torch.zeros(3, 2, dtype=torch.int32))
    q, k, v, _ = random_inputs(mask, heads=1, kv_heads=1, dtype=torch.float32)
    inputs = Inputs(q, k, v, mask.subtree_end, mask.window_start)
    forward(inputs, Options(0.5), counters=counters)
    visible = mask.to_dense()[0].numpy()
    visible = np.pad(visible, (0, 8)).reshape(13, 16, 13, 16)
    full = visible.all((1, 3)).sum()
    assert counters.forward.tolist() == [full, visible.any((1, 3)).sum() - full]


def test_strides_do_not_matter():
    q, k, v, dout = random_inputs(SMALL, dtype=torch.float32)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v, dout)]
    odd[1] = torch.stack([k, k], -1)[..., 0]
    odd[2] = torch.cat([v, v], -1)[..., : v.shape[-1]]
    assert worst_ratio(run_triton(SMALL, *odd), run_reference(SMALL, q, k, v, dout)) < 1


def test_one_row_of_mask_serves_a_batch():
    inputs = random_inputs(stack([SMALL, SMALL]), dtype=torch.float32)
    ours = run_triton(SMALL, *inputs, window=9)
    assert worst_ratio(ours, run_reference(stack([SMALL, SMALL]), *inputs, window=9)) < 1


def test_large_scores_do_not_overflow():
    q, k, v, dout = random_inputs(SMALL, dtype=torch.float32)
    inputs = (q * 100, k * 100, v, dout)
    sinks = torch.tensor([-1e4, 1e4, 0.0, 1e30])
    ours = run_triton(SMALL, *inputs, sinks=sinks)
    assert all(torch.isfinite(x).all() for x in ours)
    assert worst_ratio(ours[:1], run_reference(SMALL, *inputs, sinks=sinks)[:1]) < 10


def test_auto_stays_with_cpu_in_the_interpreter():
    assert choose_backend("cpu").name == "cpu"
    assert choose_backend("cpu", "triton").name == "triton"


def test_compiles_as_one_graph_with_gradients():
    inputs = random_inputs(SMALL, dtype=torch.float32)

    def function(q, k, v, mask, *, sinks):
        ends = mask.subtree_end
        return dispatch(q * 2, k, v, ends, sinks=sinks, backend="triton") * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    sinks = torch.linspace(-1, 1, 4)
    ours = run(SMALL, *inputs, sinks=sinks, function=compiled)
    for x, y in zip(ours, run(SMALL, *inputs, sinks=sinks, function=function), strict=True):
        assert torch.equal(x, y)


def test_autocast_casts_as_for_sdpa():
    check_autocast(SMALL, "triton")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant):
    *qkv, dout = random_inputs(SMALL, dtype=torch.float32)
    plain = run_triton(SMALL, *qkv, dout)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = checkpoint(
        lambda *qkv: attention(*qkv, SMALL, backend="triton"), *leaves, use_reentrant=use_reentrant
    )
    out.backward(dout)
    for x, y in zip((out, *(x.grad for x in leaves)), plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
def test_operators_keep_their_promises(deterministic):
    mask = mask_from_depths([0, 1, 2, 1, 2, 0, 0])
    q, k, v, dout = random_inputs(mask, value_width=4, dtype=torch.float32)
    sinks = torch.zeros(4, requires_grad=True)
    masks = (mask.subtree_end, windowed(mask, window=3).window_start)
    arguments = (*masks, sinks)
    options = (0.5, 2.0, deterministic)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = backend._plan("forward", q, v, *masks, 2.0)
    torch.library.opcheck(backend._forward, (*leaves, *arguments, plan, *options))
    torch.library.opcheck(backend._plan_in_graph, (*masks, "forward", 8, 4, q.dtype, False))
    names = ("backward_queries", "backward_keys") if deterministic else ("backward_fused",)
    plans = [part for name in names for part in backend._plan(name, q, v, *masks, 2.0)]
    with torch.no_grad():
        out, lse2 = backend._forward(*leaves, *arguments, plan, *options)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            backend._backward,
            (dout, *leaves, *arguments, out, lse2, plans, *options),
            test_utils=checks,
        )


def test_autotune_keeps_the_fastest_and_knows_no_length(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMASK_CACHE", str(tmp_path))
    row = TreeMask(typical_row(5000, "cpu"))  # raises if these are no subtree ends
    assert row.num_visible < 0.5 * 5000**2 / 2
    mask = mask_from_depths([*range(7)])
    q, k, v, _ = random_inputs(mask, width=16, value_width=16, dtype=torch.float32)
    times = iter([2.0, 1.0, 3.0] * len(KERNELS))  # of all, then of the best
    again = iter([2.0, 1.0] * len(KERNELS))
    options = [Config(16, 16, 4, stages) for stages in (1, 2, 3)]
    monkeypatch.setattr(tuner, "_FINALISTS", 2)
    clocks = [lambda run, found=found: run() and next(found) for found in (times, again)]
    autotune(*(q, k, v, mask.subtree_end), clocks=clocks, try_out=lambda *_: options)
    longer = random_inputs(CONVERSATION, width=16, value_width=16, dtype=torch.float32)
    for kernel in KERNELS:  # the first was quicker, the second is when they are timed longer
        assert choose_config(kernel, longer[0], longer[2]) == options[0]
        assert choose_config(kernel, longer[0].half(), longer[2].half()) != options[0]
        assert choose_config(kernel, longer[0], longer[2], is_plain=False) != options[0]


def test_autotune_leaves_out_what_fails_or_disagrees_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMASK_CACHE", str(tmp_path))
    mask = mask_from_depths([*range(7)])
    q, k, v, _ = random_inputs(mask, width=16, value_width=16, dtype=torch.float32)
    good, wrong, broken = options = [Config(16, 16, 4, stages) for stages in (1, 2, 3)]

    def sometimes(inputs, settings, plan=None):
        config = tuner.choose_config("forward", inputs.q, inputs.v)
        if config == broken:
            raise RuntimeError("PassManager::run failed\nand more")
        out, lse2 = forward(inputs, settings, plan)
        return (out * 1.001 if config == wrong else out), lse2

    monkeypatch.setattr(tuner, "choose_config", choose_config, raising=False)
    monkeypatch.setattr(tuner, "forward", sometimes)
    tuned = autotune(
        *(q, k, v, mask.subtree_end),
        kernels=["forward"],
        clocks=[lambda run: run() and 1.0] * 2,
        try_out=lambda *_: options,
    )["forward"]
    assert tuned.config == good
    assert [trial.elapsed_ms for trial in tuned.trials] == [1.0, None, None]
    assert tuned.trials[1].failure.startswith("DisagreesError: differs from the current one by")
    assert tuned.trials[2].failure == "RuntimeError: PassManager::run failed"


def test_autotune_stops_in_time_with_at_least_the_current_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMASK_CACHE", str(tmp_path))
    mask = mask_from_depths([*range(7)])
    q, k, v, _ = random_inputs(mask, width=16, value_width=16, dtype=torch.float32)
    clocks = [lambda run: run() and 1.0] * 2
    found = autotune(q, k, v, mask.subtree_end, clocks=clocks, limit_s=0)
    for kernel, tuned in found.items():
        assert tuned.config == candidates(kernel, q, v)[0]
        assert (tuned.trials, tuned.elapsed_ms) == ([(tuned.config, 1.0, "")], 1.0)
        assert tuned.num_candidates == len(set(candidates(kernel, q, v)))


@pytest.mark.parametrize(("capability", "has_tma"), [(80, False), (90, True), (120, True)])
def test_descriptors_are_tried_where_there_is_tma(capability, has_tma):
    q = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    with mock.patch.object(candidates_module, "capability_of", return_value=capability):
        first, second, *others = candidates("forward", q, q)
    assert not first.use_tma
    assert (second == first._replace(use_tma=True)) == has_tma
    assert any(config.use_tma for config in others) == has_tma


@pytest.mark.parametrize(
    ("name", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")], ids=["old", "new"]
)
def test_tf32_is_read_for_fp32_only_by_either_interface_of_torch(name, value):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert input_precision(torch.float32, "cuda") == "ieee"
    setattr(matmul, name, value)
    try:
        assert input_precision(torch.float32, "cuda") == "tf32"
        assert input_precision(torch.float32, "cpu") == "ieee"
        assert input_precision(torch.bfloat16, "cuda") == "ieee"
    finally:
        matmul.fp32_precision = before


def test_candidates_repeat_no_work():
    """The rule gives what was counted in machine code: exponentials of a pair, 1 or more."""
    counted = {  # queries, keys, warps
        (90, 128, "backward_keys"): {(64, 64, 8): 2, (64, 128, 8): 1, (64, 64, 4): 1},
        (90, 256, "backward_queries"): {(64, 32, 8): 2, (128, 32, 8): 1, (64, 32, 4): 1},
        (90, 256, "backward_fused"): {(32, 32, 8): 2, (64, 32, 8): 1, (16, 32, 4): 2},
        (80, 64, "backward_fused"): {(32, 128, 8): 2, (32, 64, 4): 1, (64, 128, 8): 1},
        (80, 128, "backward_fused"): {(32, 64, 8): 2, (64, 64, 8): 1, (16, 64, 4): 2},
        (80, 128, "forward"): {(128, 32, 8): 1, (64, 64, 4): 1, (128, 64, 8): 1},
        (80, 256, "forward"): {(64, 32, 8): 2, (64, 32, 4): 1, (128, 32, 8): 2, (64, 16, 4): 2},
        (100, 256, "backward_fused"): {(32, 32, 8): 2, (32, 64, 8): 1},
    }
    for (capability, width, kernel), found in counted.items():
        for (block_q, block_k, warps), times in found.items():
            config = Config(block_q, block_k, warps, 1)
            assert repeats_work(kernel, config, capability, width) == (times > 1), (kernel, config)
        for shipped in (default_config(kernel, capability, width, 2, is_plain=x) for x in (0, 1)):
            assert not repeats_work(kernel, shipped, capability, width)


def test_compiling_ahead_runs_every_candidate_in_its_own_configuration():
    q, _, v, _ = random_inputs(SMALL, dtype=torch.float32)
    pairs = [(kernel, Config(16, 16, 1, stages)) for kernel in KERNELS for stages in range(1, 9)]
    seen = []
    compile_ahead(lambda kernel: seen.append((kernel, choose_config(kernel, q, v))), pairs, np.inf)
    assert sorted(seen) == sorted(pairs)
    compile_ahead(seen.clear, pairs, -np.inf)  # too late for any
    assert len(seen) == len(pairs)


def test_an_unreadable_cache_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMASK_CACHE", str(tmp_path))
    (tmp_path / "configs.json").write_text('{"forward": 3}')
    q, _, v, _ = random_inputs(SMALL, width=16, value_width=16, dtype=torch.float32)
    assert choose_config("forward", q, v) == Config(16, 16, 1, 1)


def test_processes_that_tune_at_one_time_keep_what_each_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMASK_CACHE", str(tmp_path))
    fork = multiprocessing.get_context("fork")

    def save(name):
        for number in range(50):
            save_config(f"{name} {number}", Config(16, 16, number, 1))

    processes = [fork.Process(target=save, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    lines = json.loads((tmp_path / "configs.json").read_text())
    assert lines.keys() == {f"{name} {number}" for name in "ab" for number in range(50)}


@pytest.fixture
def num_plans(monkeypatch):
    """The number of plans made so far, by whether a window is in force."""
    counts = Counter()

    @wraps(backend.plan_lines)
    def counted(end, start=None, **options):
        counts[start is not None] += type(end) is torch.Tensor  # and not traced
        return plan_lines(end, start, **options)

    plan_lines = backend.plan_lines
    monkeypatch.setattr(backend, "plan_lines", counted)
    _cache.clear()
    return counts


def test_plans_are_made_once_for_each_kind_of_layer(num_plans):
    model = tiny_model(
        "gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    )
    _, batch = packed(random_samples(1, num_samples=2, stem=3, tail=2))
    loss = patch(model, backend="triton")(**batch).loss
    assert num_plans == {True: 1, False: 1}
    loss.backward()
    assert num_plans == {True: 2, False: 2}  # the backward pass has one kernel


def test_plans_are_made_once_in_a_compiled_graph(num_plans):
    q, k, v, dout = random_inputs(SMALL, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_layers(q, k, v, mask, *, sinks):
        for _ in range(2):
            q = dispatch(q, k, v, mask.subtree_end, window=9, backend="triton")
        return q

    run(SMALL, q, k, v, dout, function=two_layers)
    assert num_plans == {True: 2}  # forward and backward


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_models_with_all_options_equal_separate_sequences(family):
    model, samples, theirs = npass_case(family)
    ours = single_pass(patch(copy.deepcopy(model), backend="triton"), samples)
    logits, loss, grads = largest_error(ours, theirs)
    assert logits < 1e-5
    assert loss < 1e-6
    assert grads < 1e-5
