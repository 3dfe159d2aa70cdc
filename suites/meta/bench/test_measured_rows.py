"""Rows measured on the host device with a clock that is told; the host's own bench."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
from mxharness.bench import entries, host, measure, peers, table
from mxharness.bench.entries import Entry
from mxharness.bench.work import Rival
from mxharness.device import open_device
from mxharness.errors import KernelFailure
from mxharness.figures import Timing

from .rows import LIMITS, TINY, entry, record, replayed, told


@pytest.mark.parametrize("name", TINY)
def test_every_operator_is_right_repeats_and_does_not_depend_on_the_batch(name, meter, few_copies):
    found = measure.measure(entry(name), meter, replayed, LIMITS)
    assert found.key == entry(name).key
    assert found.sound
    assert found.error < {"moe": 0.01, "swiglu_ffn": 0.01}.get(name, 0.003)
    assert found.timing.us == 10.0
    assert found.reference in found.peers or not found.reference
    assert all(peer.error is None or peer.error < 0.01 for peer in found.peers.values())


def test_a_kernel_that_is_wrong_unsteady_or_depends_on_its_batch_shows(meter, few_copies):
    right = entry("gemm").work(meter)
    calls = []

    def unsteady(i):
        calls.append(i)
        return right.call(i) * (1 + len(calls))

    def row_of(**changes: object):
        wrong = Entry("gemm", "N K", TINY["gemm"], 5, "bf16", lambda *_: dataclasses.replace(right, **changes))
        return measure.measure(wrong, meter, told, LIMITS)

    assert row_of(call=lambda i: right.call(i) * 2).error == pytest.approx(1, rel=0.01)
    assert not row_of(call=unsteady).repeatable
    assert row_of(alone=lambda: right.alone() * 2).invariant is False
    assert not row_of(alone=lambda: right.alone() * 2).sound
    assert row_of(alone=None).invariant is None


def test_a_rival_that_fails_is_named_and_one_that_is_wrong_shows_its_error(meter, few_copies):
    right = entry("gemm").work(meter)

    def broken(i):
        raise RuntimeError("needs another GPU\nat 290:16")

    rivals = {"broken": Rival(broken, 2), "half": Rival(lambda i: right.call(i) / 2, 2)}
    made = Entry("gemm", "N K", TINY["gemm"], 5, "bf16", lambda *_: dataclasses.replace(right, rivals=rivals))
    found = measure.measure(made, meter, told, LIMITS)
    assert found.absent["broken"] == "fails: RuntimeError: needs another GPU"
    assert found.peers["half"].error == pytest.approx(0.5, rel=0.01)
    assert "err 0.5" in table.cells(found, table.columns([found]))[-1]


def test_what_cannot_be_timed_is_named_and_the_own_kernel_is_a_failure(meter, few_copies):
    right = entry("gemm").work(meter)

    def untimed(subjects, least_seconds, budget):
        return {name: "cannot be timed" if name == "cuBLAS" else Timing(1, 1, 1, 2) for name in subjects}

    made = Entry("gemm", "N K", TINY["gemm"], 5, "bf16", lambda *_: right)
    found = measure.measure(made, meter, untimed, LIMITS)
    assert found.absent["cuBLAS"] == "cannot be timed"
    assert found.ratio is None
    with pytest.raises(KernelFailure, match="gemm 48x64 5 bf16 cannot"):
        measure.measure(made, meter, lambda *_: {"": "cannot be timed"}, LIMITS)


def test_a_row_that_fails_is_named_and_the_others_are_measured(few_copies, monkeypatch):
    def broken(device, shape, rows, dtype):
        raise KernelFailure("a kernel failed on the GPU")

    monkeypatch.setattr(measure, "_COPIED", 1 << 10)
    chosen = [Entry("gemm", "N K", (64, 64), 1, "bf16", broken), entry("gemm")]
    found = measure.bench(open_device("host"), chosen, timer=told, limits=LIMITS)
    assert list(found.rows) == ["gemm 48x64 5 bf16"]
    assert dict(found.failed) == {"gemm 64x64 1 bf16": "a kernel failed on the GPU"}
    assert not found.sound
    assert table.verdict(found).startswith("FAIL: gemm 64x64 1 bf16: a kernel failed on the GPU")


def test_peers_that_are_not_installed_are_named_with_every_product(meter, few_copies, monkeypatch):
    monkeypatch.setattr(peers, "_installed", lambda module: False)
    found = measure.measure(entry("gemm"), meter, told, LIMITS)
    assert set(found.absent) == set(peers.PEERS)
    assert all(why.endswith("is not installed") for why in found.absent.values())
    assert set(table.absent(record(found))) == set(peers.PEERS)


# The host device -----------------------------------------------------------------------------------------------


def test_the_host_bench_is_right_on_each_number_of_threads_and_names_who_is_absent(monkeypatch):
    if len(os.sched_getaffinity(0)) > 1:
        monkeypatch.setattr(host, "THREADS", (2,))
    chosen = entries.select(["dequantize"], quick=True, entries=host.ENTRIES)
    seen = []
    found = host.bench(open_device("host"), chosen, filters=("--quick",), progress=seen.append)
    assert [one.key for one in seen] == list(found.rows)
    for one in found.rows.values():
        assert re.fullmatch(r"fp32, \d threads?", one.variant)
        assert one.sound
        assert one.error == 0
        assert set(one.peers) | set(one.absent) >= {"ggml", "gguf-py", "torchao"}
        assert all(peer.error == 0 for peer in one.peers.values())


def test_a_host_bench_that_ends_badly_says_why(monkeypatch, tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho first >&2\necho the compiler is gone >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(host.sys, "executable", str(failing))
    with pytest.raises(KernelFailure, match="the bench on 1 thread ended: the compiler is gone"):
        host.bench(open_device("host"), host.ENTRIES[:1], filters=(), progress=lambda row: None)


def test_the_host_quantises_as_torchao_does_and_as_ggml_does_but_for_ties(meter, few_copies):
    small = Entry("quantize", "N K", (64, 256), 0, "fp32", host.ENTRIES[0].build)
    found = measure.measure(small, meter, told, LIMITS)
    assert (found.error, found.sound) == (0, True)
    assert all(peer.error < 0.02 for peer in found.peers.values())
    assert "torchao" not in found.peers or found.peers["torchao"].error == 0


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_host_multiplies_in_both_modes(mode, meter, few_copies):
    build = next(one.build for one in host.ENTRIES if one.dtype == f"bf16 {mode}")
    found = measure.measure(Entry("gemm", "N K", (48, 64), 5, f"bf16 {mode}", build), meter, told, LIMITS)
    assert found.sound
    assert found.error < 0.003
    assert found.peers["torch float32"].error < 1e-6
