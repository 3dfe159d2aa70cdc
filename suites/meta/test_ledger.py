"""Known failures: strict both ways, with a reason and an end; a run that leans on them says so first."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date

import pytest
from mxharness import ledger, paths
from mxharness.errors import UserError
from mxharness.ledger import Entry
from mxharness.record import load, verdict

from .failing import HALF_IS_WRONG

GOOD = {
    "check": '"gemm-* bound"',
    "device": '"host"',
    "reason": '"being mended"',
    "expires": "2099-12-31",
    "where": '"https://example.org/issues/7"',
}
TODAY = date(2026, 11, 22)
ENTRY = Entry("gemm-* bound", "sm_*", "being mended", date(2026, 11, 22), "somebody")


def table(**changes: str | None):
    """An entry's text; None leaves a line out."""
    lines = (f"{name} = {value}" for name, value in {**GOOD, **changes}.items() if value is not None)
    return "\n".join(("[[failure]]", *lines, ""))


def test_the_ledger_that_ships_can_be_read_and_every_entry_of_its_example_too(tmp_path):
    assert all(entry.reason for entry in ledger.load())
    text = (paths.baselines() / ledger.FILE).read_text()
    example = text.partition("# [[failure]]")[2]
    (tmp_path / "example.toml").write_text("[[failure]]" + example.replace("\n# ", "\n"))
    (entry,) = ledger.load(tmp_path / "example.toml")
    assert entry.device == "sm_90"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        *(
            (table(**{name: None}), f"entry 1 of FILE has no {name}; an entry has check, device, reason")
            for name in GOOD
        ),
        (table() + table(reason='"  "'), "entry 2 of FILE: reason must be a text that is not empty, not '  '"),
        (table(check="7"), "entry 1 of FILE: check must be a text that is not empty, not 7"),
        (table(expires='"2026-12-31"'), "expires must be a date such as 2026-12-31, without quotes, not '2026-12-31'"),
        (table(expires="2026-12-31T10:00:00Z"), "expires must be a date such as 2026-12-31"),
        (table(owner='"me"'), "entry 1 of FILE has an unknown owner; an entry has check, device, reason, expires"),
        ("[failure]\n", "the known failures FILE hold something else than [[failure]] tables"),
        ("[[failures]]\n", "the known failures FILE hold something else than [[failure]] tables"),
        ("[[failure]\n", "the known failures FILE are damaged: "),
        (b"\xff\xfe", "the known failures FILE are damaged: "),
        (None, "cannot read the known failures FILE: No such file or directory"),
    ],
)
def test_a_ledger_that_is_wrong_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "known.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        ledger.load(path)
    assert sentence.replace("FILE", str(path)) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_entry_means_what_its_pattern_says_on_its_devices_until_its_day():
    assert ledger.of_device([ENTRY], "sm_90") == (ENTRY,)
    assert ledger.of_device([ENTRY], "host") == ()
    assert ledger.excuse([ENTRY], "gemm-3x33x64-bf16-normal-s0 bound", TODAY) is ENTRY
    assert ledger.excuse([ENTRY], "gemm-3x33x64-bf16-normal-s0 predicted", TODAY) is None
    assert ledger.excuse([ENTRY], "gemm-3x33x64-bf16-normal-s0 bound", date(2026, 11, 23)) is None
    assert ledger.expired([ENTRY], TODAY) == ()
    assert ledger.expired([ENTRY], date(2026, 11, 23)) == (
        "known failure 'gemm-* bound' expired on 2026-11-22: mend it or renew it (somebody)",
    )


def test_brackets_of_a_node_id_stand_for_themselves():
    entry = Entry("suites/test_fuzz.py::test_fuzz[gemm-?]", "*", "r", TODAY, "w")
    assert entry.holds_for("suites/test_fuzz.py::test_fuzz[gemm-1]")
    assert not entry.holds_for("suites/test_fuzz.py::test_fuzzg")


def test_an_entry_for_nothing_is_found():
    assert ledger.unused([ENTRY], ["a", "gemm-1 bound"]) == ()
    assert ledger.unused([ENTRY], ["a"]) == ("known failure 'gemm-* bound' on sm_* matches nothing: delete it",)


CHECKS = f"""
import mxharness.ops

mxharness.ops.OPS = (mxharness.ops.find("dequant"),)

{HALF_IS_WRONG}
@pytest.mark.parametrize("name", ["broken", "sound"])
def test_other(name):
    assert name == "sound"

def test_error():
    raise OSError("no disk")
"""


def run(folder, entries, *arguments):
    """Pytest in a process of its own on CHECKS; (exit code, first line, record)."""
    (folder / "suites").mkdir()
    (folder / "known.toml").write_text("".join(entries))
    (folder / "suites" / "test_it.py").write_text(CHECKS)
    command = [sys.executable, "-P", "-m", "pytest", "-c", "/dev/null", "--rootdir", str(folder), "-q"]
    command += ["-p", "mxharness.plugin", "-p", "no:cacheprovider", "--device", "host", "--report", str(folder)]
    command += ["--known-failures", str(folder / "known.toml"), *arguments, "suites"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("PASS: ", "FAIL: "))]
    assert lines, done.stdout + done.stderr
    return done.returncode, lines[0], json.loads((folder / "run.json").read_text())


HALF = table(check='"dequant-*-fp16-* exact"')
NOTHING = table(check='"no-such-check bound"')
OTHER = table(check='"suites/test_it.py::test_other[broken]"')


def test_known_failures_pass_and_the_first_line_counts_them(tmp_path):
    code, line, record = run(tmp_path, [HALF, OTHER, NOTHING], "-k", "not test_error")
    assert code == 0, line
    assert line.startswith("PASS: ")
    failed = [outcome for outcome in record["outcomes"] if not outcome["passed"]]
    assert len(failed) > 3
    assert {row["check"] for row in record["known"]} == {
        *(f"{outcome['case']} {outcome['gate']}" for outcome in failed),
        "suites/test_it.py::test_other[broken]",
    }
    assert all(row["reason"] == "being mended" and row["expires"] == "2099-12-31" for row in record["known"])
    assert f"; {len(failed) + 1} known failures" in line
    assert verdict(load(tmp_path / "run.json")).reasons == ("perplexity did not run (no result recorded)",)
    assert record["ledger"] == []  # of a part of the suites nobody asks whether each entry means something
    assert "known failure" not in line.replace(f"{len(failed) + 1} known failures", "")


def test_what_passes_is_expired_stands_for_nothing_or_breaks_otherwise_fails_the_run(tmp_path):
    (tmp_path / "kernels").mkdir()  # with suites/ beside it a project, whose whole suites are run
    every = table(check='"dequant-* exact"')
    late = table(check='"suites/test_it.py::test_other[broken]"', expires="2026-01-01")
    elsewhere = table(check='"suites/test_it.py::*"', device='"sm_90"', expires="2026-01-01")
    error = table(check='"*::test_error"')
    code, line, record = run(tmp_path, [every, late, elsewhere, error, NOTHING], "-n", "1")
    assert code == 1
    right = [outcome for outcome in record["outcomes"] if outcome["passed"]]
    assert len(right) > 3
    told = set(record["ledger"])
    assert len(told) == len(record["ledger"])
    assert told == {
        "known failure 'suites/test_it.py::test_other[broken]' expired on 2026-01-01: "
        "mend it or renew it (https://example.org/issues/7)",
        "known failure 'no-such-check bound' on host matches nothing: delete it",
        *(f"{one['case']} exact is listed as known failure but passes: delete 'dequant-* exact'" for one in right),
    }
    assert line.startswith("FAIL: ")
    assert all(sentence in line for sentence in told)
    assert told < set(verdict(load(tmp_path / "run.json")).reasons)
    assert len(record["known"]) == len(record["outcomes"]) - len(right)
    assert {failure["id"] for failure in record["tests"]["failures"]} == {
        "suites/test_it.py::test_other[broken]",
        "suites/test_it.py::test_error",  # listed, but with another exception than a failure
    }


def test_a_ledger_that_is_not_there_is_refused(tmp_path, capsys):
    path = tmp_path / "none.toml"
    arguments = ["-c", "/dev/null", "-p", "mxharness.plugin", "--device", "host", "--known-failures", str(path)]
    assert pytest.main([*arguments, str(tmp_path)]) == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: cannot read the known failures {path}: No such file" in capsys.readouterr().err
