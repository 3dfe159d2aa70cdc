"""What moved between two baselines beside the checks' bits: faults, kernels, divergence, the errors' distribution."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import baseline, changes, drift, record
from mxharness.device.resources import parsed

from .made import FAULTS, KERNELS, PERPLEXITY, moved, version, versions


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"faults": ({**FAULTS[0], "detector": "bound"}, FAULTS[1])}, {"swap": "drifted"}),
        ({"faults": ({**FAULTS[0], "caught": False}, FAULTS[1])}, {"swap": "failed"}),
        ({"faults": FAULTS[:1]}, {"drop": "vanished"}),
        ({"faults": (*FAULTS, {**FAULTS[0], "name": "more"})}, {"more": "new"}),
        ({"faults": None}, {}),
        ({"kernels": {}}, {}),
        ({"perplexity": ({**PERPLEXITY, "kl": 2e-5},)}, {baseline.perplexity_key(PERPLEXITY): "drifted"}),
        ({"perplexity": ({**PERPLEXITY, "kl": 1.4e-5},)}, {}),
    ],
)
def test_faults_and_divergence_are_compared(change: dict[str, object], expected: dict[str, str]) -> None:
    assert moved(*versions(version(1), version(2, **change))) == expected  # type: ignore[arg-type]  # RunRecord's fields


@pytest.mark.parametrize(
    ("column", "value", "status"),
    [("spill_stores", 8, "drifted"), ("registers", 65, "drifted"), ("registers", 40, "better")],
)
def test_a_kernels_spills_and_registers_are_compared(column: str, value: int, status: str) -> None:
    ((name, row),) = KERNELS.items()
    found = changes.between(*versions(version(1), version(2, kernels={name: {**row, column: value}})))
    (change,) = [one for one in found if one.status != "same"]
    assert (change.key, change.op, change.status) == (name, "kernels", status)
    assert change.message == f"{column} {row[column]} -> {value}"


@pytest.mark.parametrize("column", ["high_ratio", "line"])
def test_the_errors_distribution_drifts_though_the_largest_stays(column: str) -> None:
    second = version(2)
    second = replace(second, outcomes=(replace(second.outcomes[0], **{column: 0.6}), *second.outcomes[1:]))
    assert list(moved(*versions(version(1), second)).values()) == ["drifted"]


def test_a_baseline_of_before_the_tails_were_kept_still_compares() -> None:
    first, second = versions(version(1), version(2))
    old = {
        key: {name: value for name, value in row.items() if name not in ("high_ratio", "line")}
        for key, row in first.checks.items()
    }
    assert moved(replace(first, checks=old, faults={}, kernels={}), second) == {}


def test_faults_and_kernels_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.save(version(), path)
    assert record.load(path) == version()
    baseline.create("main", record.load(path), root=tmp_path)
    loaded = baseline.load("host", "main", tmp_path)
    assert loaded.kernels == KERNELS
    assert loaded.faults == {row["name"]: {"caught": True, "detector": row["detector"]} for row in FAULTS}
    assert loaded.perplexity[baseline.perplexity_key(PERPLEXITY)]["kl"] == 1.5e-5
    assert replace(loaded, name="this run") == baseline.of(version())


def test_a_fault_planted_twice_is_caught_where_both_are() -> None:
    twice = (FAULTS[0], {**FAULTS[0], "caught": False, "detector": ""}, {**FAULTS[0], "detector": "bound"})
    assert baseline.of(version(faults=twice)).faults == {"swap": {"caught": False, "detector": "bound, exact"}}


def test_a_record_of_before_kernels_were_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.save(version(), path)
    document = json.loads(path.read_text())
    del document["kernels"]
    path.write_text(json.dumps(document))
    assert record.load(path) == version(kernels={})


def test_across_device_classes_the_sentence_says_what_differs(tmp_path: Path) -> None:
    baseline.create("main", version(device_class="sm_90", environment={"gpu": "H100", "commit": "a"}), root=tmp_path)
    found = drift.compare("sm_90/main", version(environment={"cpu": "Xeon", "commit": "a"}), root=tmp_path)
    assert found.passed
    assert found.first_line.endswith("bit for bit, though these differ: cpu, gpu")


def test_across_device_classes_only_what_both_compute_is_compared() -> None:
    other = {**PERPLEXITY, "text": "wikitext"}
    gpu, host = versions(
        version(1, device_class="sm_90"),
        version(2, faults=FAULTS[:1], kernels={**KERNELS, "x.cu x": KERNELS["gemm.cu gemm_bf16"]}, perplexity=(other,)),
    )
    assert moved(gpu, host) == dict.fromkeys(map(baseline.perplexity_key, (PERPLEXITY, other)), "not run")


def test_a_narrowed_run_compiles_every_kernel_and_plants_no_fault() -> None:
    first, second = versions(
        version(1), version(2, faults=FAULTS[:1], kernels={"x.cu x": KERNELS["gemm.cu gemm_bf16"]})
    )
    found = changes.between(first, second, changes.Judged(filtered=True))
    assert {(change.key, change.status) for change in found if change.op in ("faults", "kernels")} == {
        ("swap", "same"),
        ("drop", "not run"),
        ("x.cu x", "new"),
        ("gemm.cu gemm_bf16", "vanished"),
    }


def test_what_the_assembler_says_is_read() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 39 registers, used 1 barriers, 16 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compile time = 150.810 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers
"""
    assert parsed(text) == {
        "first": {"registers": 39, "stack": 16, "spill_stores": 8, "spill_loads": 4, "shared": 64},
        "second": {"registers": 30, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0},
    }
