"""The fault runner: a fault is caught only by what the healthy kernel passes, and only if it was planted."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from mxharness import cli, faults, paths
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.faults import FAULTS, alone, detectors, matrix, matrix_text, read_matrix, run_fault, select, where
from mxharness.faults.detectors import DETECTORS, spent
from mxharness.faults.planted.families import FAMILIES
from mxharness.faults.planted.fault import FunctionChange, KernelChange
from mxharness.ops import cheapest, find

FAULT = next(fault for fault in FAULTS if fault.name == "linear-code-table")


def test_a_change_without_effect_survives():
    harmless = replace(FAULT, change=KernelChange("dequant.cu", "// Dequantise MXFP4", "// Decode MXFP4"))
    result = run_fault(harmless, "host")
    assert (result.caught, result.detector) == (False, "")
    assert result.checks > 20


def test_a_broken_healthy_kernel_catches_nothing(monkeypatch):
    broken = shipped().replaced("mxfp4.cuh", "    if (s == 0) return", "    s += 1;\n    if (s == 0) return")
    opened = faults.open_device
    monkeypatch.setattr(faults, "open_device", lambda name: opened(name, sources=broken))
    result = run_fault(FAULT, "host")
    assert not result.caught
    assert result.message.startswith("without the fault the same case fails too, which proves nothing: dequant")


def test_a_fault_whose_text_is_gone_is_an_error():
    gone = replace(FAULT, change=KernelChange("dequant.cu", "no such text", ""))
    with pytest.raises(UserError, match=r"occurs 0 times in kernels/dequant\.cu"):
        run_fault(gone, "host")


def test_undefined_behaviour_is_planted_where_it_shows():
    assert where(replace(FAULT, undefined=True), "cuda") == "host"
    assert where(FAULT, "cuda") == "cuda"


def test_a_process_that_dies_is_a_crash_and_the_next_fault_has_another():
    """The text of a Python function, so that no guard of the host device is in the way."""
    body = '    device = device_of(x, device, "x")\n    if x.ndim != 2'
    ending = FunctionChange("mxharness.functional.quantize", "quantize", body, "    __import__('os').abort()\n" + body)
    result = run_fault(replace(FAULT, change=ending, op="quantize"), "host")
    assert (result.caught, result.detector, result.message) == (True, "crash", "killed by SIGABRT")
    assert run_fault(FAULT, "host").detector == "exact"


def test_every_detector_is_tried_and_a_table_comes_back():
    rows = matrix("host", ["linear-code-table", "silent-fallback"])
    assert rows == {"linear-code-table": ("exact",), "silent-fallback": ("contract",)}
    assert matrix_text(rows, "host") == (
        '{"device": "host", "faults": {\n  "linear-code-table": ["exact"],\n  "silent-fallback": ["contract"]\n}}\n'
    )


def test_a_table_is_read_back_or_refused(tmp_path):
    rows = {"one": ("exact",), "two": ("predicted", "bound"), "none": ()}
    path = tmp_path / "host.json"
    path.write_text(matrix_text(rows, "host"))
    assert read_matrix(path) == rows
    assert alone(rows)["exact"] == ("one",)
    assert alone(rows)["bound"] == ()
    assert alone(rows, without=("predicted",))["bound"] == ("two",)
    assert "predicted" not in alone(rows, without=("predicted",))
    path.write_text("[]")
    with pytest.raises(UserError, match="no table of faults: "):
        read_matrix(path)


# ---------------------------------------------------------------------------------------------- the committed table

TABLE = paths.baselines() / "faults" / "host.json"


def test_the_table_is_of_this_catalogue():
    assert set(read_matrix(TABLE)) == {fault.name for fault in FAULTS}
    assert all(read_matrix(TABLE).values())


def test_every_detector_is_needed():
    rows = read_matrix(TABLE)
    needed = {detector for detector, names in alone(rows).items() if names}
    assert needed == set(DETECTORS)


def test_every_public_bug_family_is_planted():
    names = {fault.name for fault in FAULTS}
    assert len(FAMILIES) == 41
    for family in FAMILIES:
        assert family.faults, family
        assert set(family.faults) <= names, family
        assert family.cause, family.seen_in


def test_names_are_selected_or_refused():
    assert select(None) == FAULTS
    assert select(["linear-code-table"]) == (FAULT,)
    near = r"no fault 'gguf-nibbles'; there is gguf-nibbles-read-as-linear or [a-z-]+; `mxharness faults --list` "
    with pytest.raises(UserError, match=near):
        select(["gguf-nibbles"])
    with pytest.raises(UserError, match=r"no fault '12345'; `mxharness faults --list` lists all [0-9]+$"):
        select(["12345"])
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_faults_are_listed_and_none_is_run(capsys, monkeypatch):
    monkeypatch.setattr(faults, "run_faults", None)
    for arguments, count in (((), len(FAULTS)), ((FAULT.name,), 1)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["faults", "--list", "--json", *arguments])
        assert ended.value.code == 0
        rows = json.loads(capsys.readouterr().out)["faults"]
        assert len(rows) == count
        wanted = {"name": FAULT.name, "op": FAULT.op, "symptom": FAULT.symptom, "seen_in": FAULT.seen_in}
        assert wanted in rows


def test_a_process_is_given_up_for_what_stays_with_it():
    """A GPU's context is lost to a crash; the host device ends the launch alone."""
    assert spent({"crash"}, "cuda")
    assert spent(("bound", "memory"), "cuda")
    assert not spent({"bound", ""}, "cuda")
    assert not spent({"crash", "memory"}, "host")


@pytest.mark.parametrize(("device", "tried"), [("cuda", 1), ("host", 2)])
def test_nothing_is_tried_on_a_gpu_after_a_crash(monkeypatch, device, tried):
    seen = []

    def execution(op, case, *_, told):
        assert told
        seen.append(case)
        yield detectors.Finding("crash", case, "")

    monkeypatch.setattr(detectors, "_of_an_execution", execution)
    monkeypatch.setattr(detectors, "_again", lambda *_, **__: None)
    cases = [(find("gemm"), case) for case in find("gemm").cases[:2]]
    assert set(detectors.search_all(cases, SimpleNamespace(name=device))) == {"crash"}
    assert len(seen) == tried


def test_the_cheapest_cases_have_the_smallest_inputs_which_are_made_once():
    made = []

    def make_inputs(case):
        made.append(case)
        return find("dequant").make_inputs(case)

    op = replace(find("dequant"), make_inputs=make_inputs)
    sizes = [sum(tensor.nbytes for tensor in find("dequant").make_inputs(case).values()) for case in cheapest(op)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert cheapest(op, 3) == cheapest(op)[:3]
    assert sorted(map(str, made)) == sorted(map(str, op.cases))
