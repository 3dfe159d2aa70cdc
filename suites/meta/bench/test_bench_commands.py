"""`mxharness bench` on records, and its times in a report and in a baseline."""

from __future__ import annotations

import dataclasses
import json

import pytest
from mxharness import baseline, cli, drift
from mxharness import record as run_record
from mxharness.bench import result
from mxharness.errors import UserError
from mxharness.report import files, speed

from ..made import run as validated
from .rows import record, row


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
