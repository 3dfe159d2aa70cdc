"""Kernels that are wrong about memory, each on purpose: the host device names what they did and lives on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mxharness.device import guard, host
from mxharness.device.host import CHECKS
from mxharness.device.source import shipped
from mxharness.errors import OutOfBounds
from mxharness.execution import Fenced, execute, fetched
from mxharness.judge import digest
from mxharness.op import Case
from mxharness.ops import find

from .pretended import GPU, gpu

QUANTIZE = ("quantize.cu", "    scales[block] = static_cast<std::uint8_t>(s);\n")
SMALL = Case("quantize", (2, 64), dtype="fp32")


def run(source, old, new, case, *, placement="end", checks=(), seconds=300.0):
    """One case with a changed kernel; the healthy kernel passes the same afterwards, in the same process."""
    op = find(case.op)
    inputs = op.make_inputs(case)
    settings = {"checks": frozenset(checks), "seconds": seconds}
    broken = host.open_device(shipped().replaced(source, old, new)).configured(**settings)
    execution = execute(op, case, broken, inputs, placement=placement)
    healthy = execute(op, case, host.open_device().configured(**settings), inputs, placement=placement)
    assert healthy.violations == ()
    return execution


def after(statement, *, placement="end", checks=(), seconds=300.0):
    """The one violation of quantize with a statement more, which knows block, R and K."""
    execution = run(
        *QUANTIZE,
        f"{QUANTIZE[1]}    if (block == 0) {{ {statement} }}\n",
        SMALL,
        placement=placement,
        checks=checks,
        seconds=seconds,
    )
    assert len(execution.violations) == 1
    return execution


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("scales[0] = widen(x[2 * 64]) > 0;", "read byte 1 past the end of input x"),
        ("scales[0] = widen(x[2 * 64 + 4096]) > 0;", "read byte 16385 past the end of input x"),
        ("codes[2 * 32] = 1;", "wrote byte 1 past the end of codes"),
        ("codes[2 * 32 + 65536] = 1;", "wrote byte 65537 past the end of codes"),
        ("codes[-65536] = 1;", "wrote byte 65536 before the start of codes"),
        ("*reinterpret_cast<int*>(0x123456789abc) = 1;", "wrote address 0x123456789abc, which is near no tensor"),
        ("scales[0] = *reinterpret_cast<const int*>(0);", "read address 0x0, which is near no tensor"),
    ],
)
def test_an_access_outside_is_named(statement, sentence):
    execution = after(statement)
    assert execution.violations == (f"quantize_fp32: thread (0, 0, 0) of block (0, 0, 0) {sentence}",)
    assert execution.memory
    assert not execution.outputs


def test_an_access_before_the_start_is_named_where_the_start_is_guarded():
    execution = after("scales[0] = widen(x[-5]) > 0;", placement="start")
    assert "read byte 20 before the start of input x" in execution.violations[0]
    assert after("codes[-1] = 1;", placement="start").violations == (
        "wrote 1 bytes before the start of output codes, the nearest 1 bytes away",
    )


def test_every_tensor_ends_at_a_guard_page_and_is_aligned_to_no_more_than_promised():
    for count in (0, 1, 15, 16, 17, 4095, 4096, 4097, 100_000):
        end, odd = guard.allocate(count), guard.allocate(count, aligned=False)
        assert 0 <= len(end.whole) - end.start - count <= 15
        assert 0 <= len(odd.whole) - odd.start - count <= 1
        assert (end.whole.data_ptr() + end.start) % 16 == 0
        assert (odd.whole.data_ptr() + odd.start) % 2 == 1
        start, odd = guard.allocate(count, "start"), guard.allocate(count, "start", aligned=False)
        assert (start.whole.data_ptr() + start.start) % 32 == start.start == 16
        assert odd.start == 17


def test_guarded_memory_is_given_back_when_its_last_tensor_is_gone():
    def mappings():
        return Path("/proc/self/maps").read_text()

    guarded = guard.allocate(1 << 20)
    address = f"{guarded.whole.data_ptr():x}-"
    part = guarded.whole[guarded.start :].view(torch.float32)
    del guarded
    assert address in mappings()
    part.fill_(1)
    del part
    assert address not in mappings()


def test_what_comes_from_a_gpu_in_one_transfer_is_what_was_there():
    made = [torch.tensor([True, False, True]), torch.randn(2, 3, dtype=torch.float64), torch.empty(0, 4).half()]
    made += [
        torch.randint(0, 256, (5,), dtype=torch.uint8),
        torch.randn(7).bfloat16().t(),
        torch.arange(6).view(2, 3).t(),
    ]
    with gpu():
        got = fetched([tensor.to(GPU) for tensor in made])
    for tensor, other in zip(made, got, strict=True):
        assert type(other) is torch.Tensor
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor)


def test_tensors_of_others_are_guarded_too_and_get_what_was_written():
    fenced = Fenced(host.open_device())
    x, codes = torch.randn(2, 64), torch.zeros(2, 32, dtype=torch.uint8)
    arguments = (codes, torch.zeros(2, 2, dtype=torch.uint8), x, guard.np.int64(2), 64, 0, 0)
    right = Fenced(host.open_device())
    inside = right.empty((2, 32), torch.uint8)
    right.launch("quantize.cu", "quantize_fp32", (1,), (256,), inside, right.empty((2, 2), torch.uint8), *arguments[2:])
    fenced.launch("quantize.cu", "quantize_fp32", (1,), (256,), *arguments)
    assert torch.equal(codes, inside)
    assert codes.any()
    broken = host.open_device(
        shipped().replaced(*QUANTIZE, f"{QUANTIZE[1]}    if (block == 0) scales[0] = widen(x[128]) > 0;\n")
    )
    with pytest.raises(OutOfBounds, match=r"read byte 1 past the end of x$"):
        Fenced(broken).launch("quantize.cu", "quantize_fp32", (1,), (256,), *arguments)


@pytest.mark.parametrize("loop", ['for (;;) asm volatile("");', "for (volatile int i = 0;;) i = i + 1;"])
def test_a_kernel_without_an_end_is_ended(loop):
    started = time.monotonic()
    execution = after(loop, seconds=0.3)
    assert time.monotonic() - started < 60
    assert execution.violations == (
        "quantize_fp32: did not end within 0.3 s: thread (0, 0, 0) of block (0, 0, 0) still runs",
    )
    assert execution.hung
    assert not execution.memory


def test_a_loop_of_barriers_is_ended():
    old = "    std::uint32_t a[DMAX / MMA_K][1][4];\n"
    case = find("attention").cases[0]
    execution = run(
        "attention_few.cuh", old, f"    for (volatile int i = 0; i >= 0;) __syncthreads();\n{old}", case, seconds=0.3
    )
    assert "did not end within 0.3 s: thread (" in execution.violations[0]
    assert execution.hung


def test_a_fault_in_one_of_many_blocks_ends_all():
    case = Case("quantize", (400, 640), dtype="fp32")
    change = f"{QUANTIZE[1]}    if (block == 4000) scales[0] = widen(x[K * R + 4096]) > 0;\n"
    execution = run(*QUANTIZE, change, case)
    assert "thread (160, 0, 0) of block (15, 0, 0) read byte 16385 past the end of input x" in execution.violations[0]


def test_what_else_a_processor_refuses():
    divided = after("volatile int zero = 0; scales[0] = K / zero;")
    assert "divided an integer by zero" in divided.violations[0]
    assert not divided.memory
    assert not divided.hung
    deep = "volatile char far[57000]; far[0] = 1; scales[0] = far[0];"
    assert "used more than its stack of 64 KiB" in after(deep).violations[0]


LAUNCH = """
import ctypes, os
from mxharness.device import host
from mxharness.device.source import shipped
from mxharness.execution import execute
from mxharness.op import Case
from mxharness.ops import find
op, case = find("quantize"), Case("quantize", (2, 64), dtype="fp32")
inputs = op.make_inputs(case)
assert execute(op, case, host.open_device(), inputs).violations == ()
"""


def test_a_fault_outside_kernels_still_ends_the_process():
    """The handlers are there for the time of a launch only, and only for kernels."""
    done = subprocess.run([sys.executable, "-c", f"{LAUNCH}ctypes.string_at(8)"], check=False)
    assert done.returncode == -signal.SIGSEGV


def test_a_forked_process_has_its_own_limit():
    """In a process of its own, since Python warns of a fork beside threads."""
    loop = '    for (;;) asm volatile("");'
    endless = f"shipped().replaced({QUANTIZE[0]!r}, {QUANTIZE[1]!r}, {loop!r})"
    script = f"""{LAUNCH}
broken = host.open_device({endless}).configured(seconds=0.3)
child = os.fork()
if child == 0:
    ended = execute(op, case, broken, inputs).violations[0]
    os._exit(7 if "did not end within 0.3 s" in ended else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False, timeout=120)
    assert done.returncode == 7


# ------------------------------------------------------------------------------------- every access, one by one

ATTENTION = Case("attention", (1, 1, 1, 1, 32, 1))
BARRIERS = {
    "before the chunk maximum": ("the keys have been used", "a write and a read of the same 4 bytes of shared memory"),
    "before P V": ("values and weights are there", "a read and a write of the same 4 bytes of shared memory"),
    "before Q K": (
        "copied keys are there, the last values have been used",
        "a read and a write of the same 16 bytes",
    ),
}


@pytest.mark.parametrize(
    ("statement", "checks", "sentence"),
    [
        ("scales[0] = widen(x[128]) > 0;", "memcheck", "read byte 1 past the end of input x"),
        ("codes[64] = 0xFF;", "memcheck", "wrote byte 1 past the end of codes"),
        ("scales[0] = codes[63];", "initcheck", "read byte 63 of codes, which nothing has written"),
        ("scales[0] = K * (1 << 30) > R;", "undefined", "a signed multiplication overflows at quantize.cu:"),
        ("scales[0] = 1 << (K - 32 + R);", "undefined", "a shift past the width of the type"),
        ("int few[4] = {}; scales[0] = few[K / 16];", "undefined", "an index outside its array"),
        (
            "scales[0] = *reinterpret_cast<const int*>(reinterpret_cast<const char*>(x) + 1);",
            "undefined",
            "misaligned",
        ),
    ],
)
def test_each_check_sees_what_is_its_own(statement, checks, sentence):
    execution = after(statement, checks=frozenset([checks]))
    assert "quantize_fp32: thread (0, 0, 0) of block (0, 0, 0)" in execution.violations[0]
    assert sentence in execution.violations[0]
    if checks != "memcheck":  # what lies outside is seen by the guard pages and canaries too
        change = f"{QUANTIZE[1]}    if (block == 0) {{ {statement} }}\n"
        others = frozenset(CHECKS) - {checks, "racecheck" if checks == "initcheck" else checks}
        broken = host.open_device(shipped().replaced(*QUANTIZE, change)).configured(checks=others)
        op = find("quantize")
        assert execute(op, SMALL, broken, op.make_inputs(SMALL)).violations == ()


@pytest.mark.parametrize("place", BARRIERS)
def test_a_missing_barrier_is_a_race(place):
    """Of these, the second goes unnoticed without: the order of fibers happens to be right."""
    text, sentence = BARRIERS[place]
    old = f"        __syncthreads();  // {text}\n"
    execution = run("attention.cuh", old, "", ATTENTION, checks=frozenset(["racecheck"]))
    assert execution.violations[0].startswith(f"attention_few64_bf16: {sentence}")
    assert "without a barrier between: thread (" in execution.violations[0]


READ_AND_WRITTEN = re.compile("a read and a write|a write and a read")  # whichever comes first


def test_a_race_between_blocks_is_seen_and_one_between_equal_values_is_none():
    case = Case("quantize", (400, 64), dtype="fp32")
    race = run(*QUANTIZE, f"{QUANTIZE[1]}    scales[0] = block;\n", case, checks=frozenset(["racecheck"]))
    assert "two writes of the same 1 byte, byte 0 of scales, without a barrier between" in race.violations[0]
    same = run(*QUANTIZE, f"{QUANTIZE[1]}    codes[0] = 1;\n", case, checks=frozenset(["racecheck"]))
    assert READ_AND_WRITTEN.search(" ".join(same.violations)) is None
    read = run(
        *QUANTIZE, f"{QUANTIZE[1]}    if (block) scales[block] = scales[0];\n", case, checks=frozenset(["racecheck"])
    )
    assert READ_AND_WRITTEN.search(read.violations[0])
    assert "of the same 1 byte, byte 0 of scales" in read.violations[0]


SHARED = ("norm.cu", "    __shared__ float scratch[THREADS / WARP];\n")


def test_shared_memory_that_nothing_wrote_is_named_and_is_poison_without_the_check():
    case = find("rms_norm").cases[0]
    unwritten = f"{SHARED[1]}    if (scratch[0] == 1e30f) return 0.0f;\n"
    execution = run(*SHARED, unwritten, case, checks=frozenset(["initcheck"]))
    assert "read 4 bytes of shared memory that nothing has written" in execution.violations[0]
    leaks = f"{SHARED[1]}    if (scratch[0] != scratch[0]) return scratch[0];\n"
    op = find("rms_norm")
    inputs = op.make_inputs(case)
    broken = host.open_device(shipped().replaced(*SHARED, leaks))
    for _ in range(2):  # also when the block before has left numbers there
        assert execute(op, case, broken, inputs).outputs["y"].isnan().all()


def test_locals_that_nothing_wrote_have_a_pattern_in_checked_kernels():
    if not host._local_poison():
        pytest.skip("the compiler has no -ftrivial-auto-var-init: locals are not filled")
    change = f"{QUANTIZE[1]}    if (block == 0) {{ int few[4]; few[K % 3] = 0; scales[0] = few[3]; }}\n"
    op = find("quantize")
    device = host.open_device(shipped().replaced(*QUANTIZE, change)).configured(checks=frozenset(["memcheck"]))
    assert execute(op, SMALL, device, op.make_inputs(SMALL)).outputs["scales"][0, 0] == 0xFE


def test_a_workspace_that_nothing_wrote_is_named():
    """moe_forward's products read what its activation wrote."""
    case = min(find("moe_forward").cases, key=lambda case: case.shape)
    change = ("    if (first >= count) return;\n", "    if (first + SWIGLU_WIDTH >= count) return;\n")
    execution = run("ffn.cu", *change, case, checks=frozenset(["initcheck"]))
    assert ", which nothing has written" in execution.violations[0]


@pytest.mark.parametrize("place", ["before the chunk maximum", "before P V"])
def test_a_drawn_order_shows_a_missing_barrier_without_the_check(place):
    """What racecheck proves, other bits show."""
    text = BARRIERS[place][0]
    broken = host.open_device(shipped().replaced("attention.cuh", f"        __syncthreads();  // {text}\n", ""))
    op, case = find("attention"), Case("attention", (2, 1, 8, 1, 128, 65), options=("sinks",))
    inputs = op.make_inputs(case)
    right = digest(execute(op, case, host.open_device(), inputs).outputs)
    for seed in (1, 2, 3):
        assert digest(execute(op, case, host.open_device().configured(seed=seed), inputs).outputs) == right
        assert digest(execute(op, case, broken.configured(seed=seed), inputs).outputs) != right, seed


def test_a_drawn_order_is_the_same_again_and_visits_every_block_once():
    case, op = Case("quantize", (400, 64), dtype="fp32"), find("quantize")
    device = host.open_device(shipped().replaced(*QUANTIZE, f"{QUANTIZE[1]}    scales[0] = blockIdx.x;\n"))
    inputs = op.make_inputs(case)
    left = [
        int(
            execute(op, case, device.configured(seed=seed, checks=frozenset(["memcheck"])), inputs).outputs["scales"][
                0, 0
            ]
        )
        for seed in (0, 0, 5, 5, 6)
    ]
    assert left[0] == left[1] == 3  # the last of four
    assert left[2] == left[3]
    assert len(set(left)) > 1
