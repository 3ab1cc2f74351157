"""Every kernel compiled for chips that are not there: what its loops do, memory, wgmma."""

import gc
import os
import re
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from flexmask_kernels import launches as queues  # noqa: E402 (after the skip)
from flexmask_kernels.backward_pass import backward  # noqa: E402
from flexmask_kernels.configs import default_config  # noqa: E402
from flexmask_kernels.inputs import Options  # noqa: E402
from flexmask_kernels.tuning import forced_configs  # noqa: E402
from sass import decode  # noqa: E402
from triton_compile import (  # noqa: E402
    CUOBJDUMP,
    MASK,
    absent_gpu,
    compile_launch,
    disassembled,
    launches,
    zero_inputs,
)

from flexmask import PrefixTree, compile_mask  # noqa: E402

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="needs Triton's cuobjdump")

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
CAPABILITIES = (80, 90, 100)
WIDTHS = (64, 128, 256)
ATTENTION = ("forward", "backward_queries", "backward_keys", "backward_fused")
MAX_REGISTERS = 255
# of the instructions of a loop, where some are let through; the configurations were chosen with 3.9
FEW_SPILLS = 0.03
SPILLS = 0 if triton.__version__.startswith("3.9.") else FEW_SPILLS
MAX_SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KB a program


@cache
def compiled(name, capability, width, value_width=None, dtype=torch.bfloat16, options=()):
    found = launches(
        capability, width=width, value_width=value_width, dtype=dtype, **dict(options)
    )[name]
    return found, compile_launch(found, capability)


def check_limits(binary, capability, spills=SPILLS):
    for loop in binary.loops:
        assert loop.spills <= spills * loop.size, "a loop spills registers"
    assert binary.registers <= MAX_REGISTERS
    assert binary.shared <= MAX_SHARED[capability] * 1024


def check_work(found, binary):
    """Each pair of a tile has one exponential, or two with a softcap, in one thread only."""
    a = found.arguments
    pairs = a["BLOCK_Q"] * a["BLOCK_K"] // (32 * a["num_warps"])  # of a thread
    # the forward kernel rescales its rows too, of which a thread holds at most 2 of 16
    rows = min(a["BLOCK_Q"] // 8, pairs) if found.name == "forward" else 0
    assert len(binary.loops) == 2, "over full tiles and over partial ones"
    for loop in binary.loops:
        assert 0 <= loop.exponents - pairs * (1 + a["HAS_SOFTCAP"]) <= rows


@pytest.mark.parametrize("width", WIDTHS, ids=lambda D: f"D{D}")
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("name", ATTENTION)
def test_shipped_configurations_do_nothing_twice_and_fit(name, capability, width):
    found, binary = compiled(name, capability, width)
    check_limits(binary, capability)
    check_work(found, binary)
    if default_config(name, 120, width, 2) == found.config:
        assert binary.shared <= MAX_SHARED[120] * 1024
    if capability == 90 and not (width == 256 and name == "backward_keys"):
        assert "wgmma.mma_async" in binary.ptx  # that one has tiles of 32 rows, too few for it
    if name == "backward_fused" and capability >= 90:
        # triton 3.6 writes atom, whose unused result ptxas drops
        assert re.search(r"(red|atom)\.\S*\.v4\.f32", binary.ptx), "dq is added four at a time"


def test_the_widest_fused_kernel_where_99_kb_are_all():
    """It has a configuration of its own, the only one that spills in a loop (docs/kernels.md)."""
    found, binary = compiled("backward_fused", 120, 256)
    check_limits(binary, 120, FEW_SPILLS)
    check_work(found, binary)


OPTIONS = {"softcap": 30.0, "has_window": True, "sinks": torch.zeros(8)}


@pytest.mark.parametrize("name", ATTENTION)
def test_options_do_nothing_twice_and_spill_nothing(name):
    found = launches(90, width=128, **OPTIONS)[name]
    binary = compile_launch(found, 90)
    check_limits(binary, 90)
    check_work(found, binary)


@pytest.mark.parametrize("name", ATTENTION)
def test_odd_and_unequal_widths_do_nothing_twice_and_spill_nothing(name):
    found, binary = compiled(name, 90, 96, value_width=72)
    check_limits(binary, 90)
    check_work(found, binary)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
def test_machine_code_is_read_as_the_disassembler_reads_it(capability):
    cubin = compiled("backward_keys", capability, 64)[1].cubin
    assert decode(cubin, capability) == disassembled(cubin)


@pytest.mark.parametrize("width", [64, 128], ids=lambda D: f"D{D}")
@pytest.mark.parametrize("name", ATTENTION)
def test_fp32_is_not_rounded_to_tf32(name, width):
    found, binary = compiled(name, 90, width, dtype=torch.float32)
    check_limits(binary, 90)
    check_work(found, binary)
    assert "tf32" not in binary.ptx


@pytest.mark.parametrize(
    ("capability", "name"),
    [*((90, name) for name in ATTENTION), (100, "forward")],
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else value,
)
def test_descriptors_copy_every_walked_tile_and_keep_wgmma(capability, name):
    config = default_config(name, capability, 128, 2)._replace(use_tma=True)
    with forced_configs({name: config}):
        found = launches(capability, width=128)[name]
    binary = compile_launch(found, capability)
    check_limits(binary, capability, 2 * FEW_SPILLS)  # the autotuner weighs them
    check_work(found, binary)
    assert "cp.async.bulk.tensor" in binary.ptx
    assert "cp.async.cg" not in binary.ptx, "a tile of the loop is copied by threads"
    assert ("wgmma.mma_async" in binary.ptx) == (capability == 90)


def test_the_small_kernel_compiles_without_spills():
    assert compile_launch(launches(90, width=64)["delta"], 90).stack == 0


def test_no_kernel_is_specialised_on_a_length():
    """L and all that follows from it are plain integers, so a new length compiles nothing."""
    sizes = {"L", "num_lines", "capacity", "num_rows", "num_splits", "num_round"}
    for found in {**launches(90, width=64), **launches(90, width=64, has_window=True)}.values():
        for parameter in found.kernel.params:
            if parameter.name in sizes:
                assert parameter.do_not_specialize, (found.name, parameter.name)


@pytest.mark.parametrize("has_window", [False, True], ids=["all", "window"])
def test_a_first_call_compiles_few_kernels(has_window):
    """One for a forward pass, two or three for a backward pass: plans compile nothing."""
    found = list(launches(90, width=64, has_window=has_window))
    assert found[0] == "forward"
    assert set(found[1:]) == {"delta", *ATTENTION} - {"forward"}


@contextmanager
def empty_caches(folder, listener):
    """Nothing is compiled yet, `listener` hears what is, and the garbage collector pauses.

    The pause keeps old Pythons from failing to parse in a thread (see `launches.compile_new`).
    """
    with pytest.MonkeyPatch.context() as patch, absent_gpu(90):
        patch.setattr(triton.knobs.cache, "dir", str(folder))
        patch.setattr(triton.knobs.compilation, "listener", listener)
        patch.setattr(queues, "_compiled", set())
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def deterministic_backward(mask, width):
    inputs, lse2 = zero_inputs(mask, width), torch.zeros(1, 8, mask.shape[1])
    backward(inputs.q, inputs, inputs.q, lse2, Options(0.1), deterministic=True)


@pytest.fixture(scope="module")
def compiled_by_pass(tmp_path_factory):
    """(kernel, thread) of all that two deterministic passes compile, of different lengths.

    The two large kernels of the first one wait for each other before they are done. One of them
    has descriptors.
    """
    both, found = threading.Barrier(2), []

    def listen(*, src, **_):
        if src.name in ("backward_queries_kernel", "backward_keys_kernel"):
            both.wait(timeout=120)  # raises where they come one after the other
        found[-1].append((src.name, threading.current_thread()))

    longer = compile_mask(PrefixTree.from_turns([(71, 101, 83)] * 3))
    with_tma = default_config("backward_keys", 90, 16, 2)._replace(use_tma=True)
    forced = forced_configs({"backward_keys": with_tma})
    with empty_caches(tmp_path_factory.mktemp("triton"), listen), forced:
        for mask in (MASK, longer):
            found.append([])
            deterministic_backward(mask, 16)
    return found


def test_a_first_pass_compiles_its_kernels_side_by_side(compiled_by_pass):
    first = dict(compiled_by_pass[0])
    assert {"backward_queries_kernel", "backward_keys_kernel", "delta_kernel"} <= set(first)
    assert threading.main_thread() not in first.values(), "something was left to its launch"


def test_a_new_length_compiles_nothing(compiled_by_pass):
    assert compiled_by_pass[1] == []


def test_what_fails_to_compile_in_a_thread_is_compiled_by_its_launch(tmp_path):
    failed, compiled = set(), set()

    def listen(*, src, **_):
        if threading.current_thread() is not threading.main_thread():
            failed.add(src.name)
            raise SystemError("AST constructor recursion depth mismatch")
        compiled.add(src.name)

    with empty_caches(tmp_path, listen):
        deterministic_backward(MASK, 32)
    assert {"backward_queries_kernel", "backward_keys_kernel", "delta_kernel"} <= failed
    assert failed == compiled


def table_lines():
    yield (
        "| kernel | chip | D | tile (queries x keys) | warps | stages "
        "| exponents | instructions | spills | registers | KB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name in ATTENTION:
        for capability in CAPABILITIES:
            for width in WIDTHS:
                found, binary = compiled(name, capability, width)
                block_q, block_k, num_warps, num_stages, _ = found.config
                threads = 32 * num_warps / (block_q * block_k)  # of a pair
                full, partial = binary.loops
                yield (
                    f"| `{name}` | sm_{capability} | {width} | {block_q} x {block_k} "
                    f"| {num_warps} | {num_stages} | {full.exponents * threads:.2f} "
                    f"| {full.size * threads:.1f}, {partial.size * threads:.1f} "
                    f"| {full.spills}, {partial.spills} | {binary.registers} "
                    f"| {binary.shared / 1024:.0f} |"
                )


def test_docs_table_is_what_the_compiler_says():
    """The document has a table for each of two compilers; another one has to agree on the tiles."""
    version = ".".join(triton.__version__.split(".")[:2])
    text = DOCUMENT.read_text()
    known = re.findall(r"<!-- begin: registers (\S+) -->", text)
    section = version if version in known else known[0]
    start, stop = (f"<!-- {word}: registers {section} -->\n" for word in ("begin", "end"))
    before, rest = text.split(start)
    table, after = rest.split(stop)
    lines = list(table_lines())
    expected = f"Triton {triton.__version__}, bf16:\n\n" + "\n".join(lines) + "\n"
    if section != version:  # all that the compiler does not choose
        written = [line.split("|")[1:7] for line in table.splitlines()[2:]]
        assert written == [line.split("|")[1:7] for line in lines], "run `make docs`"
    elif os.environ.get("FLEXMASK_WRITE_DOCS"):
        DOCUMENT.write_text(before + start + expected + stop + after)
    else:
        assert table == expected, "run `make docs`"
