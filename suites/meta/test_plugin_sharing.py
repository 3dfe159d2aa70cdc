"""Tests start without a look for garbage; workers take tests from each other, and spread those that plant faults."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from mxharness import plugin
from mxharness.device import cuda
from mxharness.device.source import shipped
from mxharness.plugin import starting
from mxharness.plugin.sharing import dealt, spread

PROJECT = {
    "conftest.py": """
import pytest
pytest_plugins = ["mxharness.plugin.starting", "mxharness.plugin.sharing"]
@pytest.fixture
def plant(): ...
""",
    "test_it.py": """
import gc, pytest
LOOKED = gc.isenabled()
@pytest.mark.parametrize("gate", ["a", "b", "c", "d"])
def test_check(gate): ...
@pytest.mark.parametrize("name", ["x", "y"])
def test_fault(name, plant): ...
@pytest.mark.long("together")
def test_slow(): ...
@pytest.mark.long
def test_slower(): ...
@pytest.mark.long("together")
def test_slow_as_well(): ...
def test_last():
    assert (LOOKED, gc.isenabled(), gc.get_freeze_count() > 1000) == (False, True, True)
""",
}
CHECKS, FAULTS = ["check[a]", "check[b]", "check[c]", "check[d]"], ["fault[x]", "fault[y]"]
TOGETHER, SLOW = ["slow", "slow_as_well", "slower"], ["slow", "slower", "slow_as_well"]
SPREAD = ["fault[x]", *CHECKS[:2], "fault[y]", *CHECKS[2:], "last"]


@pytest.mark.parametrize(
    ("options", "scheduling", "order"),
    [
        (("-n", "1"), "WorkStealing", [*TOGETHER, *SPREAD]),
        (("-n", "1", "--dist", "load"), "Load", [*TOGETHER, *SPREAD]),
        ((), "", [*CHECKS, *FAULTS, *SLOW, "last"]),
    ],
    ids=["by default", "asked for", "one process"],
)
def test_a_worker_takes_from_others_and_has_its_faults_among_the_checks(tmp_path, options, scheduling, order):
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "xdist.plugin", *options]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # other plugins take long to import
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=True)
    assert re.findall(r"scheduling tests via (\w+)Scheduling", done.stdout) == ([scheduling] if scheduling else [])
    assert re.findall(r"PASSED.* test_it.py::test_(\S+)|::test_(\S+) PASSED", done.stdout) == [
        (name, "") if options else ("", name) for name in order
    ]


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ("", ""),
        ("sab", "sab"),
        ("CaCb", "CaCb"),
        ("sCs", "ssC"),
        ("aCCCCssb", "asCCsCCb"),
        ("CCsss", "ssCsC"),
    ],
)
def test_slow_ones_are_spread_over_those_they_are_to_be_among(items, found):
    assert "".join(spread(list(items), lambda one: one == "s", lambda one: one == "C")) == found


@pytest.mark.parametrize(
    ("items", "shares", "found"),
    [
        ("", 3, ""),
        ("abcde", 2, "abcde"),
        ("abcX", 1, "Xabc"),
        ("abcX", 2, "Xabc"),
        ("abcdXXYf", 2, "XXabYcdf"),
        ("aXbXcYdeZf", 3, "XXaYbcZdef"),
        ("aWXbY", 2, "WYXab"),
        ("XXXXaY", 3, "XXXXYa"),
    ],
)
def test_each_share_begins_with_some_of_those_that_take_long(items, shares, found):
    assert "".join(dealt(list(items), lambda one: one if one.isupper() else None, shares)) == found


def test_shares_are_those_that_workers_are_given():
    """The rule of pytest-xdist: of what is left, each worker takes its part."""
    items = [f"{'long' if i % 8 == 7 else 'short'} {i}" for i in range(43)]
    pending = dealt(items, lambda one: one if one.startswith("long") else None, 5)
    assert sorted(pending) == sorted(items)
    begins = []
    for left in range(5, 0, -1):
        share, pending = pending[: len(pending) // left], pending[len(pending) // left :]
        begins.append(share[0])
    assert begins == [one for one in items if one.startswith("long")]


@pytest.mark.parametrize("looks", [True, False])
def test_who_looked_for_garbage_before_looks_again_and_nobody_else(looks, pytestconfig):
    kept = pytestconfig.stash[starting._COLLECTS]
    try:
        gc.enable() if looks else gc.disable()
        starting.pytest_configure(pytestconfig)
        assert not gc.isenabled()
        starting.pytest_unconfigure(pytestconfig)
        assert gc.isenabled() is looks
    finally:
        pytestconfig.stash[starting._COLLECTS] = kept
        gc.enable()


def test_all_kernels_are_compiled_for_a_gpu_and_none_for_the_cpu(device, monkeypatch):
    asked = []
    monkeypatch.setattr(cuda, "compile_cubin", lambda *arguments: asked.append(arguments))
    card = cuda.CudaDevice.__new__(cuda.CudaDevice)  # without a GPU
    card.sources, card.architecture = shipped(), "sm_90a"
    starting.compile_kernels(card)
    for thread in [one for one in threading.enumerate() if one.name.startswith("ThreadPoolExecutor")]:
        thread.join()
    assert sorted(asked) == [(shipped(), name, "sm_90a") for name in sorted(shipped().names())]
    if device.name == "host":
        starting.compile_kernels(device)
        assert len(asked) == len(shipped().names())


@pytest.mark.parametrize(("whole", "workers", "begun"), [(True, 2, True), (False, 2, False), (True, None, False)])
def test_a_whole_run_with_workers_begins_to_compile(whole, workers, begun, monkeypatch):
    found = []
    config = SimpleNamespace(
        option=SimpleNamespace(collectonly=False, numprocesses=workers),
        stash={plugin._SESSION: SimpleNamespace(whole=whole)},
        getoption=lambda name: None,
    )
    monkeypatch.setattr(plugin.watch, "of", lambda config: None)
    monkeypatch.setattr(plugin, "device_of", lambda config: "card")
    monkeypatch.setattr(starting, "compile_kernels", found.append)
    plugin.pytest_sessionstart(SimpleNamespace(config=config))
    assert found == (["card"] if begun else [])
