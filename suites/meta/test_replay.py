"""A failing check leaves a folder, and the folder is judged again: by another rule, on another device, by anybody."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from mxharness import cli, repro
from mxharness.device import open_device
from mxharness.device.source import shipped
from mxharness.document import API_VERSION
from mxharness.errors import UserError
from mxharness.execution import execute
from mxharness.faults import FAULTS
from mxharness.judge import judge
from mxharness.ops import find
from mxharness.replay import replay

from .failing import SUM, narrow, save

FAULT = next(fault for fault in FAULTS if fault.name == "linear-code-table")
DECODE = next(case for case in find("dequant").cases if case.shape[-1] > 32)


def broken():
    return open_device("host", sources=shipped().replaced(FAULT.change.file, FAULT.change.old, FAULT.change.new))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    return save(tmp_path_factory.mktemp("failures"), narrow(find("mma")), SUM, "bound", open_device("host"))[0]


@pytest.fixture
def wrong_sum(made_once, tmp_path):
    return shutil.copytree(made_once, tmp_path / made_once.name)


def run(capsys, *arguments):
    """The command line in this process; (exit code, output, errors)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", "--device", "host", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_a_planted_fault_fails_again_with_the_same_words_and_the_healthy_kernel_passes(tmp_path):
    op, device = find("dequant"), broken()
    folder, outcome = save(tmp_path, op, DECODE, "exact", device)
    saved = repro.load(folder)
    assert saved.outcome == outcome
    assert (saved.case, saved.gate, saved.op) == (DECODE, "exact", op)
    again = replay(saved, device)
    assert again.outcome == outcome
    assert again.same_outputs
    assert again.first_line == f"FAIL: {DECODE} under exact on host still fails; it failed on host"
    healthy = replay(saved, open_device("host"))
    assert healthy.outcome.passed
    assert not healthy.same_outputs
    assert healthy.first_line.startswith("PASS: ")
    assert f"kernels: changed since: kernels/{FAULT.change.file}" in healthy.notes
    elements = healthy.outcome.elements
    note = next(note for note in healthy.notes if note.startswith("outputs: other bits than on host: "))
    assert 0 < int(note.split(": ")[2].split()[0]) == outcome.bad <= elements


def test_a_kernel_that_leaves_nothing_is_replayed_too(tmp_path):
    op, device = find("dequant"), open_device("host")
    inputs = op.make_inputs(DECODE)
    outcome = judge(op, DECODE, "exact", "sm_90", inputs, replace(execute(op, DECODE, device, inputs), outputs={}))
    folder = repro.save(tmp_path, "crash", op, DECODE, "exact", device, inputs, {}, outcome)
    again = replay(repro.load(folder), device)
    assert again.outcome.passed
    assert "outputs: some now, none on sm_90" in again.notes


def test_another_device_class_judges_the_same_tensors(tmp_path, monkeypatch):
    host = open_device("host")
    monkeypatch.setattr(type(host), "device_class", "sm_90")
    folder, _ = save(tmp_path, narrow(find("mma")), SUM, "bound", host)
    monkeypatch.undo()
    again = replay(repro.load(folder), open_device("host"))
    assert again.outcome.device == "host"
    assert again.first_line.endswith("on host still fails; it failed on sm_90")
    assert again.same_outputs
    assert {"outputs: the bits that were saved on sm_90", "kernels: as when it failed"} <= set(again.notes)


def test_a_gate_that_nothing_is_known_for_is_refused(tmp_path, monkeypatch):
    op, host = find("mma"), open_device("host")
    inputs = op.make_inputs(SUM)
    execution = execute(op, SUM, host, inputs)
    outcome = judge(op, SUM, "predicted", "host", inputs, execution)
    saved = repro.load(repro.save(tmp_path, "x", op, SUM, "predicted", host, inputs, execution.outputs, outcome))
    assert replay(saved, host).outcome.passed
    monkeypatch.setattr(type(host), "device_class", "sm_42")
    with pytest.raises(UserError, match="gate predicted cannot be judged here: sm_42 has no device fact"):
        replay(saved, host)


def test_the_saved_rule_or_another(wrong_sum, capsys):
    code, out, _ = run(capsys, wrong_sum)
    assert code == 1
    roundoff = find("mma").tolerance.unit_roundoff
    assert f"tolerance: as saved; mma is judged with --unit-roundoff {roundoff!r} today" in out
    assert f"paste into mma.CASES: {SUM!r}" in out
    code, out, _ = run(capsys, wrong_sum, "--unit-roundoff", roundoff)
    assert code == 0
    assert out.splitlines()[-1].startswith(f"PASS: {SUM} under bound on host passes with unit roundoff ")
    ratio = repro.load(wrong_sum).outcome.ratio
    for factor, wanted in ((0.99, 1), (1.01, 0)):
        code, out, _ = run(capsys, wrong_sum, "--scale-bound", ratio * factor)
        assert code == wanted, out
        assert f" with the bound times {ratio * factor:g}; it failed on host" in out.splitlines()[-1]


def test_what_it_says_as_json(wrong_sum, capsys):
    code, out, _ = run(capsys, wrong_sum, "--json")
    told = json.loads(out)
    assert (code, told["passed"], told["same_outputs"], told["other_inputs"]) == (1, False, True, [])
    assert told["message"] == told["saved_message"]
    assert told["ratio"] == told["saved_ratio"] > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--scale-bound", "2", "--unit-roundoff", "1e-7"), "are two answers to one question; give one"),
        (("--scale-bound", "nan"), "nan is no positive number"),
        (("--unit-roundoff", "-1"), "-1 is no positive number"),
    ],
)
def test_a_rule_that_is_none_is_refused(wrong_sum, capsys, arguments, sentence):
    code, _, err = run(capsys, wrong_sum, *arguments)
    assert code == 2
    assert sentence in err


def test_bits_have_no_bound_to_scale(tmp_path, capsys):
    folder, _ = save(tmp_path, find("dequant"), DECODE, "exact", broken())
    code, _, err = run(capsys, folder, "--scale-bound", "2")
    assert (code, err) == (
        2,
        "mxharness: gate exact compares bits and has no bound; leave --scale-bound and --unit-roundoff out\n",
    )


def test_inputs_are_the_saved_ones_whatever_the_case_makes_now(wrong_sum, monkeypatch):
    op = find("mma")

    def other(case):
        inputs = dict(op.make_inputs(case))
        return {**inputs, "a": inputs["a"] + 1}

    monkeypatch.setattr("mxharness.ops.find", lambda _: replace(op, make_inputs=other))
    saved = repro.load(wrong_sum)
    assert saved.other_inputs == ("a",)
    again = replay(saved, open_device("host"))
    assert again.same_outputs
    assert "inputs: as saved; from the case this version makes another a" in again.notes


def test_large_tensors_are_left_out_and_made_again(tmp_path, monkeypatch):
    op = find("mma")
    sizes = {name: tensor.nbytes for name, tensor in op.make_inputs(SUM).items()}
    monkeypatch.setattr(repro, "LIMIT", sum(sizes.values()) - 1)
    folder, _ = save(tmp_path, narrow(op), SUM, "bound", open_device("host"))
    largest = sorted(sizes, key=sizes.get)[-1]
    assert json.loads((folder / repro.CASE).read_text())["left_out"]["inputs"] == [largest]
    assert set(safetensors.torch.load_file(folder / repro.INPUTS)) == set(sizes) - {largest}
    assert replay(repro.load(folder), open_device("host")).same_outputs
    other = replace(op, make_inputs=lambda case: {**op.make_inputs(case), largest: op.make_inputs(case)[largest] * 2})
    monkeypatch.setattr("mxharness.ops.find", lambda _: other)
    with pytest.raises(UserError, match=f"{largest} were left out and this version makes others"):
        repro.load(folder)


def changed_case(folder, change):
    document = json.loads((folder / repro.CASE).read_text())
    change(document)
    (folder / repro.CASE).write_text(json.dumps(document))


def cut(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def pickled(folder):
    torch.save({"a": torch.zeros(3)}, folder / repro.INPUTS)


def tensors(folder, change):
    inputs = safetensors.torch.load_file(folder / repro.INPUTS)
    change(inputs)
    safetensors.torch.save_file(inputs, folder / repro.INPUTS)


HOSTILE = {
    "no case": (lambda folder: (folder / repro.CASE).unlink(), "is not a saved failure: it has no case.json"),
    "no inputs": (lambda folder: (folder / repro.INPUTS).unlink(), "it has no inputs.safetensors"),
    "no outputs": (lambda folder: (folder / repro.OUTPUTS).unlink(), "it has no outputs.safetensors"),
    "half the case": (lambda folder: cut(folder, repro.CASE), "is damaged: "),
    "half the inputs": (lambda folder: cut(folder, repro.INPUTS), "is no whole safetensors file ("),
    "half the outputs": (lambda folder: cut(folder, repro.OUTPUTS), "is no whole safetensors file ("),
    "a pickle": (pickled, "is no whole safetensors file ("),
    "depth": (lambda folder: (folder / repro.CASE).write_text("[" * 500_000), "case.json is "),
    "a newer version": (
        lambda folder: changed_case(folder, lambda d: d.update(api_version=API_VERSION + 1)),
        f"has api_version {API_VERSION + 1} and this mxharness reads up to {API_VERSION}; update mxharness",
    ),
    "no operator": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(op="nothing")),
        "case.json: no operator 'nothing'; there are quantize, dequant, mma, ",
    ),
    "no gate": (
        lambda folder: changed_case(folder, lambda d: d.update(gate="exact")),
        f"no gate 'exact' for {SUM}; there are bound, predicted",
    ),
    "no dtype": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(dtype="fp7")),
        "case.json is not a complete failure (ValueError: no dtype 'fp7'",
    ),
    "no axes": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(shape=[3])),
        "the case has 1",
    ),
    "no sizes": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(shape=[2**40, 2**40])),
        "no kernel is run on sizes [1099511627776, 1099511627776]",
    ),
    "no number": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(shape=["a", 16])),
        "sizes and seed are whole numbers",
    ),
    "no such case": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(shape=[4, 16], seed=-1, options=["x", 1])),
        "all else is text",
    ),
    "another shape": (
        lambda folder: changed_case(folder, lambda d: d["case"].update(shape=[1, 16])),
        "inputs.safetensors: ",
    ),
    "a missing tensor": (lambda folder: tensors(folder, lambda t: t.pop("a")), "inputs.safetensors holds b, c; "),
    "another dtype": (lambda folder: tensors(folder, lambda t: t.update(a=t["a"].float())), "torch.float32, "),
    "another value": (
        lambda folder: tensors(folder, lambda t: t["a"].view(-1)[:1].add_(1)),
        "inputs.safetensors is not what case.json says: it was changed",
    ),
    "no tolerance": (lambda folder: changed_case(folder, lambda d: d.pop("tolerance")), "(KeyError: 'tolerance')"),
    "a folder for a file": (
        lambda folder: [(folder / repro.OUTPUTS).unlink(), (folder / repro.OUTPUTS).mkdir()],
        "it has no outputs.safetensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_that_is_none_is_one_sentence(wrong_sum, capsys, name):
    harm, sentence = HOSTILE[name]
    harm(wrong_sum)
    code, out, err = run(capsys, wrong_sum)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("mxharness: ")
    assert err.count("\n") == 1


def test_no_folder_and_one_that_is_too_large(wrong_sum, capsys, monkeypatch):
    assert run(capsys, wrong_sum / "nowhere")[2].endswith("nowhere'; a failing check names the one it saved\n")
    monkeypatch.setattr(repro, "LIMIT", 16)
    assert "is larger than the 0 MiB that are ever saved" in run(capsys, wrong_sum)[2]
