"""Functions in a process of their own: what they return, raise, and what becomes of one that dies or hangs."""

from __future__ import annotations

import operator
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mxharness import elsewhere
from mxharness.device import cuda, open_device
from mxharness.device.cuda import CudaDevice
from mxharness.device.source import shipped
from mxharness.errors import KernelFailure, UserError
from mxharness.execution import execute
from mxharness.faults.detectors import cheapest_first
from mxharness.judge import digest
from mxharness.ops import find
from mxharness.sandbox import Lost, Sandbox, spread


@pytest.fixture
def sandbox():
    with Sandbox(20) as box:
        yield box


def test_results_come_back_from_one_child(sandbox):
    child = sandbox.call(os.getpid)
    assert sandbox.call(operator.add, 2, 3) == 5
    assert sandbox.call(os.getpid) == child != os.getpid()


def test_errors_are_raised_here_and_the_child_lives_on(sandbox):
    child = sandbox.call(os.getpid)
    with pytest.raises(ZeroDivisionError):
        sandbox.call(operator.truediv, 1, 0)
    with pytest.raises(UserError, match="no operator 'nothing'"):
        sandbox.call(find, "nothing")
    with pytest.raises(TypeError, match="pickle"):
        sandbox.call(open, os.devnull)
    assert sandbox.call(os.getpid) == child


@pytest.mark.parametrize(("number", "name"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGABRT, "SIGABRT")])
def test_a_signal_is_named_and_the_next_call_answered(sandbox, number, name):
    child = sandbox.call(os.getpid)
    with pytest.raises(Lost, match=f"^killed by {name}$"):
        sandbox.call(os.kill, child, number)
    assert sandbox.call(os.getpid) != child


def test_an_exit_is_named(sandbox):
    with pytest.raises(KernelFailure, match=r"^the process ended with exit code 7$"):
        sandbox.call(os._exit, 7)


def test_a_hang_is_killed(sandbox):
    child = sandbox.call(os.getpid)
    sandbox.limit = 0.5
    started = time.monotonic()
    with pytest.raises(Lost, match=r"^no answer within 0\.5 s$"):
        sandbox.call(time.sleep, 60)
    assert time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    sandbox.limit = 20
    assert sandbox.call(operator.add, 1, 1) == 2


def test_work_is_spread_and_a_death_is_one_result():
    results = dict(spread(os._exit, [3], 1)) | dict(spread(abs, [-1, -2, -3, -4], 2))
    assert str(results.pop(3)) == "the process ended with exit code 3"
    assert results == {-1: 1, -2: 2, -3: 3, -4: 4}


def test_a_spent_process_is_not_used_again():
    ask = ["__import__('os').getpid()"] * 3
    assert len({pid for _, pid in spread(eval, ask, 1, spent=lambda pid: pid > 0)}) == 3
    assert len({pid for _, pid in spread(eval, ask, 1)}) == 1


def test_a_lost_context_moves_executions_to_another_process(monkeypatch):
    """Without a GPU: a device that says its context is lost, whose kernels the child finds on the host."""
    device = object.__new__(CudaDevice)
    device.name, device.sources = "host", shipped()
    op, case = cheapest_first((find("dequant"),))[0]
    inputs = op.make_inputs(case)
    monkeypatch.setattr(cuda, "_lost", ["an illegal access"])
    moved = execute(op, case, device, inputs)
    assert moved.violations == ()
    monkeypatch.setattr(cuda, "_lost", [])
    assert digest(moved.outputs) == digest(execute(op, case, open_device("host"), inputs).outputs)


def test_a_kernel_that_breaks_while_the_next_is_loaded_is_a_failure_and_takes_the_context(monkeypatch):
    """Launches do not wait: what loads the next kernel is told of the one before."""

    class Error(Exception):
        pass

    def broken(*_: object) -> None:
        raise Error("an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "_lost", [])
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_, **__: Path(__file__))
    device = object.__new__(CudaDevice)
    device.sources, device.architecture, device.optimised = shipped(), "sm_90a", None
    device._modules, device._functions = {}, {}
    device._driver = SimpleNamespace(
        Error=Error, module_from_buffer=broken, Context=SimpleNamespace(synchronize=broken)
    )
    assert not device.dead
    with pytest.raises(KernelFailure, match=r"^a kernel failed on the GPU: an illegal memory access was encountered$"):
        device.launch("dequant.cu", "dequant_bf16", (1,), (1,))
    assert device.dead


def test_a_child_that_fails_is_thrown_away(monkeypatch):
    device = object.__new__(CudaDevice)
    device.name = "host"
    begin = "OF_BLOCK;  // a row, padding included\n"
    ends_apart = f"{begin}    if (threadIdx.x == 0) return; __syncthreads();\n"
    device.sources = shipped().replaced("dequant.cu", begin, ends_apart)
    op, case = cheapest_first((find("dequant"),))[0]
    monkeypatch.setattr(cuda, "_lost", ["an illegal access"])
    elsewhere._child().call(os.getpid)
    failed = execute(op, case, device, op.make_inputs(case))
    assert failed.outputs == {}
    assert len(failed.violations) == 1
    assert elsewhere._child()._process is None
