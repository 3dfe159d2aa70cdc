"""The bench: what it selects, counts, compares and stores; its rows on the host device with a clock that is told."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest
import torch
from mxharness import baseline, cli, drift, figures, timing
from mxharness import record as run_record
from mxharness.bench import compare, entries, host, layers, measure, peers, result, table, work
from mxharness.bench.entries import ENTRIES, Entry
from mxharness.bench.work import Rival
from mxharness.device import open_device
from mxharness.device.meter import Meter
from mxharness.errors import KernelFailure, UserError
from mxharness.figures import Ceilings, Timing
from mxharness.functional import ffn_forward, gemm
from mxharness.report import files, speed
from mxharness.timing import Subject

from .made import run as validated

LIMITS = Ceilings(bandwidth=1e9, matrix_rate=1e12, source="a device that is told")
TINY = {
    "dequantize": (48, 64),
    "quantize": (48, 64),
    "gemm": (48, 64),
    "gemm_bias": (48, 64),
    "gemm_batch": (2, 48, 64),
    "gemm_persistent": (48, 64),
    "embedding": (100, 64),
    "rms_norm": (64,),
    "layer_norm": (64,),
    "swiglu": (64,),
    "apply_rope": (4, 32),
    "lm_head_greedy": (100, 64),
    "lm_head_topk": (100, 64),
    "swiglu_ffn": (64, 96),
    "attention_prefill": (4, 2, 32),
    "attention_decode": (4, 2, 32, 40),
    "attention_decode_mxfp4": (4, 2, 32, 40),
    "kv_append": (2, 32, 40),
    "kv_append_mxfp4": (2, 32, 40),
    "moe": (8, 64, 32),
}
"""A shape of each operator that a CPU multiplies in a moment."""


@pytest.fixture
def few_copies(monkeypatch):
    """Up to five copies, fewer of what is larger: a cache of 8 kB is left cold."""
    monkeypatch.setattr(timing, "WORKING_SET", 8192)
    monkeypatch.setattr(timing, "MOST_COPIES", 5)
    yield
    work.released()


@pytest.fixture
def meter():
    return Meter(open_device("host"))


def told(subjects, least_seconds, budget):
    """A timer that calls nobody: the kernel takes 10 us, its rivals 20, 30 .."""
    return {name: Timing(10.0 * (i + 1), 9.5 * (i + 1), 10.5 * (i + 1), 5) for i, name in enumerate(subjects)}


def replayed(subjects, least_seconds, budget):
    """A timer that makes a graph's calls without a graph, with its checks; the times are told."""
    for subject in subjects.values():
        before = subject.launched() if subject.launched else 0
        wanted = [subject.call(i).clone() for i in range(subject.copies)]
        outputs = [subject.call(i).clone() for i in range(subject.copies + 1)]
        timing.check_written(outputs, wanted, exact=subject.own)
        assert not subject.launched or subject.launched() - before >= len(wanted) + len(outputs)
    return told(subjects, least_seconds, budget)


def entry(op, rows=5, dtype="bf16"):
    build = next(one.build for one in ENTRIES if one.op == op)
    return Entry(op, "axes", TINY[op], 0 if op in ("dequantize", "quantize") else rows, dtype, build)


def record(*rows, **changes: object):
    facts = {
        "device_class": "sm_90",
        "unit": "a GPU",
        "driver": "580",
        "started": "2026-11-22T00:00:00Z",
        "seconds": 1.0,
        "ceilings": LIMITS,
        "copy_bandwidth": 3e12,
        "environment": {"torch": "2"},
    }
    return result.Bench(**{**facts, **changes}, rows={row.key: row for row in rows})


def row(us=10.0, spread=0.01, rows=16, **changes: object):
    made = result.Row(
        op="gemm",
        shape="4096x4096",
        axes="N K",
        rows=rows,
        variant="bf16",
        timing=Timing(us, us * (1 - spread / 2), us * (1 + spread / 2), 60, 40),
        working_set=1,
        nbytes=8_912_896,
        flops=536_870_912,
        limited="bytes",
        floor_us=3.0,
        error=0.0017,
        repeatable=True,
        invariant=True,
        reference="cuBLAS",
        peers={"cuBLAS": result.Peer(Timing(15.0, 14.9, 15.1, 60), 0.0017)},
        absent={"gemlite": "not installed"},
    )
    return dataclasses.replace(made, **changes)


# What is measured ----------------------------------------------------------------------------------------------


def test_there_is_a_row_for_every_shape_of_the_peers_and_every_operator_and_each_has_a_name_of_its_own():
    keys = [one.key for one in ENTRIES]
    assert len(set(keys)) == len(keys)
    assert {one.op for one in ENTRIES} == set(TINY)
    products = {(one.shape, one.rows, one.dtype) for one in ENTRIES if one.op == "gemm"}
    assert len(products) == len(entries.SHAPES) * 7 * 2
    assert {(one.shape[0], one.rows) for one in ENTRIES if one.op == "moe"} == {
        (experts, tokens) for experts in (32, 128) for tokens in (1, 16, 256, 2048)
    }
    assert all(len(one.shape) == len(one.axes.split()) for one in ENTRIES)


def test_selection_by_operator_shape_rows_and_the_quick_few():
    found = entries.select(["gemm"], ["4096x4096", "2880x2880"], [1, 16])
    assert {(one.op, one.label, one.rows) for one in found} == {
        ("gemm", shape, rows) for shape in ("2880x2880", "4096x4096") for rows in (1, 16)
    }
    assert entries.select() == list(ENTRIES)
    quick = entries.select(quick=True)
    assert 16 <= len(quick) <= 40
    assert {"gemm", "moe", "attention_decode", "dequantize"} <= {one.op for one in quick}
    assert all(one.rows for one in entries.select(rows=[16]))


@pytest.mark.parametrize(
    ("ops", "shapes", "rows", "quick", "message"),
    [
        (["gem"], [], [], False, "no operator 'gem' there; there are dequantize, quantize, gemm, "),
        (["gemm"], ["1x1"], [], False, "no shape '1x1' there; there are 2880x2880, 5760x2880, "),
        (["gemm"], [], [3], False, "no row count '3' there; there are 1, 4, 16, 64, 256, 512, 2048"),
        (["moe"], [], [2048], True, "no quick row has this operator, shape and row count; leave out --quick"),
    ],
)
def test_what_no_row_has_is_refused_with_what_there_is(ops, shapes, rows, quick, message):
    with pytest.raises(UserError, match=re.escape(message)):
        entries.select(ops, shapes, rows, quick=quick)


def test_the_floor_is_the_larger_of_bytes_and_operations():
    assert work.floor_seconds(3_050, 844, 3.05e12, 844e12) == 1e-9
    assert work.floor_seconds(1, 8_440, 3.05e12, 844e12) == 1e-11
    assert work.floor_seconds(6_100, 844_000, 3.05e12, 844e12) == 2e-9


def test_a_product_counts_17_bytes_a_block_and_each_activation_once(meter, few_copies):
    made = entry("gemm", rows=5).work(meter)
    assert made.nbytes == 48 * 64 * 17 // 32 + 2 * 5 * 64 + 2 * 5 * 48
    assert made.flops == 2 * 5 * 48 * 64
    assert entry("gemm_persistent").work(meter).nbytes == 2 * 48 * 64 + 2 * 5 * (48 + 64)
    assert entry("dequantize").work(meter).nbytes == 48 * 64 * 17 // 32 + 2 * 48 * 64


def test_causal_attention_counts_the_pairs_that_are_seen(meter, few_copies):
    prefill, decode = (entry(f"attention_{kind}").work(meter) for kind in ("prefill", "decode"))
    assert prefill.flops == 4 * 4 * 32 * (5 * 6 // 2)
    assert decode.flops == 4 * 4 * 32 * 5 * 40
    assert decode.nbytes == 2 * 5 * 2 * 40 * 32 * 2 + 2 * 2 * 5 * 4 * 32


def test_experts_count_as_often_as_some_token_meets_them(meter, few_copies):
    one = work.packed_bytes(64, 64) + work.packed_bytes(64, 32)
    made = entry("moe", rows=1).work(meter)
    assert made.nbytes == layers.CHOSEN * one + 4 * 64 + 2 * 8 * 64
    assert made.flops == 2 * (layers.CHOSEN * 3 * 32 * 64 + 8 * 64)


# Rows ----------------------------------------------------------------------------------------------------------


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
        raise RuntimeError("needs another GPU")

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


# Graphs --------------------------------------------------------------------------------------------------------


def test_as_many_copies_as_leave_the_cache_cold_and_calls_as_make_a_graph_long():
    assert timing.copies_for(timing.WORKING_SET) == 2
    assert timing.copies_for(timing.WORKING_SET // 10) == 10
    assert timing.copies_for(1) == timing.MOST_COPIES
    assert timing.calls_for(38, 1.4e-6) == 76
    assert timing.calls_for(10, 3e-6) == 60
    assert timing.calls_for(5, 326e-6) == 5
    assert timing.calls_for(2, 10.0) == 2


def test_a_graph_that_lacks_kernels_is_refused():
    timing.check_captured(40, 40, 40)
    with pytest.raises(KernelFailure, match="did not capture the kernels: it holds 0 of them, and 40 were launched"):
        timing.check_captured(0, 40, 40)
    with pytest.raises(KernelFailure, match="holds 79 of them, and 80 were launched in 40 calls"):
        timing.check_captured(79, 80, 40)
    with pytest.raises(KernelFailure, match="holds 39"):
        timing.check_captured(39, 0, 40)


def test_a_graph_that_writes_nothing_or_other_bits_is_refused():
    right = [torch.ones(3), torch.full((3,), 2.0)]
    timing.check_written([right[0], right[1], right[0]], right, exact=True)
    with pytest.raises(KernelFailure, match="call 1 of 2 of the CUDA graph gave other bits"):
        timing.check_written([right[0], right[0]], right, exact=True)
    timing.check_written([right[1], right[0]], right, exact=False)
    for like in (torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.uint8)):
        with pytest.raises(KernelFailure, match="call 0 of 1 of the CUDA graph wrote nothing"):
            timing.check_written([timing.unwritten(like)], [like], exact=False)


def test_launches_are_counted_for_what_a_graph_must_hold(meter):
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = work.weights(meter, (64, 64), 1)[0]
    gemm(x, weight, device=meter)
    assert meter.launches == 1
    ffn_forward(x, weight, weight, device=meter)
    assert meter.launches == 4


def test_subjects_take_turns_and_each_call_is_on_the_next_copy():
    seen = []
    subjects = {name: Subject(lambda i, name=name: seen.append((name, i)), 2) for name in "ab"}
    found = timing.clock_times(subjects, 1e-6, 0.0)
    assert seen[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert found["a"].repeats == len(seen) / 2 >= 4
    assert found["a"].low <= found["a"].us <= found["a"].high


def test_a_timing_is_the_median_of_its_repeats_and_their_deciles():
    found = figures.timing([i * 1e-5 for i in range(1, 12)], calls=10)
    assert (found.us, found.low, found.high) == pytest.approx((6.0, 2.0, 10.0))
    assert found.spread == pytest.approx(8 / 6)
    assert (found.repeats, found.calls) == (11, 10)


# Records and comparison ----------------------------------------------------------------------------------------


def test_a_record_is_read_back_as_it_was(tmp_path):
    made = record(row(error=float("nan"), invariant=None), row(rows=1, spread=0.02), filters=("--quick",))
    result.save(made, tmp_path / "bench.json")
    back = result.load(tmp_path / "bench.json")
    assert result.text(back) == (tmp_path / "bench.json").read_text()
    assert str(back.rows.pop("gemm 4096x4096 16 bf16").error) == "nan"
    assert back.rows == {key: one for key, one in made.rows.items() if one.rows == 1}
    assert (back.ceilings, back.filters, back.unit) == (LIMITS, ("--quick",), "a GPU")
    lines = (tmp_path / "bench.json").read_text().splitlines()
    assert sum('"gemm 4096x4096' in line for line in lines) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read bench record .*: No such file"),
        ("{", "bench record .* is damaged"),
        ("{}", "is not a bench record: it has no api_version"),
        ('{"api_version": 99}', "has api_version 99 and this mxharness reads up to 1"),
        ('{"api_version": 1}', "is not a complete bench record"),
        ('{"api_version": 1, "rows": {"a": 1}}', "is not a complete bench record"),
    ],
)
def test_what_is_no_record_is_refused(content, message, tmp_path):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        result.load(path)


def test_a_planted_slowdown_is_named_and_one_within_the_spread_is_not():
    before = record(row(10.0), row(10.0, rows=1), row(10.0, 0.1, rows=64))
    after = record(row(10.5), row(10.3, rows=1), row(11.5, 0.1, rows=64))
    found = compare.compare(before, after, "sm_90")
    status = {moved.key.split()[2]: moved.status for moved in found.rows}
    assert status == {"16": "slower", "1": "same", "64": "same"}  # 4 % at least, else both spreads: 20 % of 64
    assert not found.passed
    assert found.first_line.startswith("FAIL: 1 slower: gemm 4096x4096 16 bf16; 3 rows against sm_90, 2 as fast")
    assert "10 -> 10.5 us, 1.050x; the spread explains 1.040x; cuBLAS 1.000x" in found.failing[0].message
    assert compare.compare(after, before, "sm_90").first_line == "PASS: 3 rows against sm_90, 2 as fast, 1 faster"


def test_rows_that_are_new_gone_or_unsound():
    before, after = record(row(), row(rows=1)), record(row(repeatable=False), row(rows=4))
    found = {moved.key.split()[2]: moved.status for moved in compare.compare(before, after, "x").rows}
    assert found == {"16": "unsound", "1": "vanished", "4": "new"}
    narrowed = dataclasses.replace(after, filters=("--rows 4",))
    assert "1" not in {moved.key.split()[2] for moved in compare.compare(before, narrowed, "x").rows}
    alone = compare.compare(before, record(row(invariant=False), row(rows=1)), "x")
    assert [moved.message for moved in alone.failing] == ["depends on the batch"]


def test_another_unit_or_driver_is_refused_unless_it_is_named():
    before, after = record(row()), record(row(), unit="another GPU", driver="590")
    message = "the unit was a GPU and is another GPU and the driver was 580 and is 590; --despite unit --despite driver"
    with pytest.raises(UserError, match=message):
        compare.compare(before, after, "x")
    with pytest.raises(UserError, match="the driver was 580 and is 590; --despite driver compares all the same"):
        compare.compare(before, after, "x", ["unit"])
    found = compare.compare(before, after, "x", ["unit", "driver"])
    assert found.passed
    assert found.differs == (("unit", "a GPU", "another GPU"), ("driver", "580", "590"))


# The command and the report ------------------------------------------------------------------------------------


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command_compares_records_and_exits_by_what_it_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    result.save(record(row()), before)
    result.save(record(row(20.0)), after)
    code, out, _ = run(capsys, "--from", after, "--compare", before)
    assert code == 1
    assert "FAIL: 1 slower: gemm 4096x4096 16 bf16" in out
    assert "20 ±0.5%" in out
    assert "15 (0.75x)" in out
    assert "not measured: gemlite: not installed (gemm 4096x4096 16 bf16)" in out
    code, out, _ = run(capsys, "--from", after, "--compare", after, "--json")
    assert (code, json.loads(out)["comparison"]["verdict"]) == (0, f"PASS: 1 row against {after}, 1 as fast, 0 faster")
    result.save(record(row(repeatable=False)), after)
    code, out, _ = run(capsys, "--from", after)
    assert (code, "FAIL: bits that do not repeat" in out, "OTHER AGAIN" in out) == (1, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "host", "--op", "nothing"), "the bench has no operator 'nothing' there; there are quantize"),
        (("--from", "missing.json"), "cannot read bench record missing.json: No such file"),
        (("--from", "x.json", "--quick"), "--from takes a record as it is; leave out"),
        (("--plot", "x.pdf"), "a plot is a .png or .svg file, not 'x.pdf'"),
        (("--compare", "sm_00"), "no file and no committed bench record called 'sm_00'; there "),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_times_are_drawn_over_rows_beside_the_floor_and_the_peers(tmp_path):
    left_out = row(shape="64x64"), row(rows=1, variant="fp16"), row(rows=4, variant="fp16")
    made = record(row(), row(rows=1), row(rows=4, peers={}), *left_out)
    panels = speed.panels(made)
    assert list(panels) == ["gemm 4096x4096 bf16"]
    curves = {curve.label: curve for curve in panels["gemm 4096x4096 bf16"]}
    assert [x for x, _ in curves["mxharness"].points] == [1, 4, 16]
    assert (len(curves["floor"].points), len(curves["cuBLAS"].points)) == (3, 2)
    speed.draw(made, tmp_path / "speed.svg")
    assert "<svg" in (tmp_path / "speed.svg").read_text()


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


# In a report and in a baseline ---------------------------------------------------------------------------------


def test_a_report_shows_the_times_beside_a_run_and_what_became_slower_since_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setenv(baseline.ADDRESS, str(tmp_path / "store"))
    before, after = (record(row(us), row(rows=1), device_class="sm_80") for us in (10.0, 20.0))
    found = validated(device_class="sm_80")
    baseline.create("v1", found, speed=before)
    run_record.save(found, tmp_path / "run.json")
    assert speed.of_run(tmp_path, "") is None
    alone = speed.of_run(tmp_path, "sm_80/v1")
    assert (alone.note, alone.comparison) == ("of baseline sm_80/v1", None)
    result.save(after, tmp_path / result.FILE)
    page = files.write(found, tmp_path, drift.compare("v1", found)).read_text()
    shown = page[page.index('<section id="speed">') :]
    assert "FAIL: 1 slower: gemm 4096x4096 16 bf16; 2 rows against sm_80/v1" in shown
    assert "20 ±0.5%" in shown
    assert '<svg role="img"' in shown
    assert "gemlite: not installed" in shown
    assert '<a href="#speed">Speed</a>' in page
    result.save(dataclasses.replace(after, unit="another GPU"), tmp_path / result.FILE)
    assert (
        "Times of sm_80/v1 cannot be compared" in files.write(found, tmp_path, drift.compare("v1", found)).read_text()
    )


def test_a_baseline_holds_the_times_and_is_compared_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(baseline.ADDRESS, str(tmp_path / "store"))
    found, times = validated(device_class="sm_90"), record(row())
    run_record.save(found, tmp_path / "run.json")
    result.save(times, tmp_path / result.FILE)
    cli_code(capsys, "baseline", "create", "v1", "--run", tmp_path / "run.json")
    assert result.text(baseline.load("sm_90", "v1").speed) == result.text(times)
    assert "1 row on a GPU" in cli_code(capsys, "baseline", "show", "sm_90/v1")
    result.save(record(row(20.0)), tmp_path / "slow.json")
    assert run(capsys, "--from", tmp_path / "slow.json", "--compare", "sm_90/v1")[0] == 1
    baseline.create("v2", found)
    assert baseline.load("sm_90", "v2").speed is None
    code, _, err = run(capsys, "--from", tmp_path / "slow.json", "--compare", "sm_90/v2")
    assert (code, "baseline sm_90/v2 has no speed" in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_class": "sm_80"}, "the bench was made on sm_80 and the run on sm_90"),
        ({"failed": {"gemm 1x1": "why"}}, "a bench with rows that failed cannot be part of a baseline: gemm 1x1"),
    ],
)
def test_times_that_do_not_belong_to_the_run_are_no_part_of_a_baseline(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        baseline.create("v1", validated(device_class="sm_90"), root=tmp_path, speed=record(row(), **changes))
    assert not list(tmp_path.rglob("*.json"))


def cli_code(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    return out
