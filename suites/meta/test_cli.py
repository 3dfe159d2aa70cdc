"""The command line: help without heavy packages, exit codes, one-sentence errors, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import cli, paths, record
from mxharness.op import Outcome

COMMANDS = (
    (),
    *((name,) for name in sorted(cli.commands.commands)),
    *(("baseline", name) for name in ("create", "compare", "list")),
)


def test_a_run_that_becomes_a_baseline_is_not_compared_with_the_one_before():
    from mxharness.commands.running import Request, pytest_arguments

    plain, blessing = (pytest_arguments(Request(blessing=flag), "host") for flag in (False, True))
    assert [part for part in blessing if part not in plain] == [str(paths.suites() / "test_regression.py")]
    assert (paths.suites() / "test_regression.py").is_file()


def test_all_of_the_suites_take_the_cores_and_a_part_of_them_one_process(monkeypatch):
    from mxharness.commands import running

    def workers(**changes: object) -> str:
        arguments = running.pytest_arguments(running.Request(**changes), "host")
        return arguments[arguments.index("-n") + 1]

    for cores, used in ((1, "1"), (3, "3"), (64, str(running.MOST_WORKERS))):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert workers() == used
    assert workers(ops=("gemm",)) == workers(quick=True) == workers(expression="bf16") == "0"
    assert workers(ops=("gemm",), workers="5") == workers(workers="5") == "5"


HEAVY = ("torch", "numpy", "pandas", "matplotlib", "jinja2", "rich", "hypothesis", "pycuda", "datasets", "pytest")

# Runs the command line where importing any package named in the first argument fails.
BLOCKED = """
import sys
names = sys.argv[1].split(",")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from mxharness.cli import main
main(sys.argv[2:])
"""


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `mxharness ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    code = ended.value.code
    assert isinstance(code, int)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def blocked(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mxharness ARGUMENTS` in a process of its own without `packages`."""
    command = (sys.executable, "-P", "-c", BLOCKED, ",".join(packages), *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command) or "top")
def test_help_describes_every_option(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, *command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(('mxharness', *command))}")
    assert "--help" in out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c and c != ("baseline",)], ids="-".join)
def test_every_command_takes_json(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json" in outcome(capsys, *command, "--help")[1]


def test_help_and_version_import_nothing_heavy() -> None:
    help_, version = blocked(HEAVY, "run", "--help"), blocked(HEAVY, "--version")
    assert (help_.returncode, version.returncode) == (0, 0), help_.stderr + version.stderr
    assert "--device" in help_.stdout
    assert version.stdout.startswith("mxharness, version ")


def test_missing_torch_is_one_sentence_that_says_what_to_install() -> None:
    plain, as_json = blocked(("torch",), "list"), blocked(("torch",), "list", "--json")
    assert (plain.returncode, as_json.returncode) == (2, 2), plain.stderr
    assert plain.stdout == ""
    assert plain.stderr.startswith("mxharness: mxharness needs torch: pip install torch==")
    assert plain.stderr.count("\n") == 1
    assert json.loads(as_json.stdout)["error"].startswith("mxharness needs torch: pip install torch==")


def test_info_works_without_torch_and_says_that_it_is_missing() -> None:
    found = blocked(("torch",), "info", "--json")
    assert found.returncode == 0, found.stderr
    assert all("needs torch: pip install" in device["missing"] for device in json.loads(found.stdout)["devices"])


BAD_INPUT = {
    "unknown command": (("frobnicate",), "No such command 'frobnicate'"),
    "unknown device": (("run", "--device", "tpu"), "'tpu' is not one of 'auto', 'host', 'cuda'"),
    "unknown operator": (("run", "--op", "nothing"), "no operator 'nothing'; there are "),
    "no windows": (("run", "--perplexity-windows", "0"), "0 is not in the range x>=1"),
    "unknown protocol": (("perplexity", "--protocol", "mine"), "'mine' is not one of 'windows-512-half'"),
    "unknown model": (("perplexity", "--model", "gpt-9"), "no model 'gpt-9'; there are smollm2, "),
    "unknown text": (("perplexity", "--text", "nowhere.txt"), "no text 'nowhere.txt'; there are "),
    "unknown artefact": (("fetch", "gpt-9"), "nothing called 'gpt-9' can be fetched; there is smollm2"),
    "unknown fault": (("faults", "no-such-fault"), "no fault 'no-such-fault'; "),
    "run.json missing": (("report", "missing.json"), "cannot read run record missing.json: No such file"),
    "baseline of a missing run": (("baseline", "compare", "main", "--run", "missing.json"), "cannot read run record"),
    "unknown baseline": (("baseline", "compare", "sm_00/none", "--device", "host"), "no baseline sm_00/none; "),
    "run of an unknown model": (("run", "--model", "gpt-9"), "no model 'gpt-9'; there are smollm2, "),
    "run of a missing model": (("run", "--model", "gpt-9.gguf"), "no model file gpt-9.gguf"),
    "unknown workers": (("run", "-n", "many"), "'many' is neither a whole number nor 'auto'"),
    "unknown windows": (("perplexity", "--windows", "many"), "'many' is neither a whole number nor 'all'"),
    "baseline name": (("baseline", "create", "a b", "--device", "host"), "'a b' is no name for a baseline; take up to"),
    "unusable output": (("run", "--device", "host", "--out", "/dev/null/out"), "cannot write to '/dev/null/out'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_exits_2_and_says_what_exists(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_INPUT[name]
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert message in err
    assert "Traceback" not in err
    code, out, err = outcome(capsys, *arguments, "--json")
    assert code == 2
    assert message in json.loads(out)["error"]


def test_unusable_cache_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotADirectoryError(20, "Not a directory", str(tmp_path / "cache" / "host"))

    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mxharness.device.open_device", refuse)
    code, out, err = outcome(capsys, "run", "--no-perplexity")
    assert (code, out) == (2, "")
    assert err.startswith(f"mxharness: Not a directory: {tmp_path / 'cache' / 'host'}; set MXHARNESS_CACHE to ")
    assert "Not a directory" in json.loads(outcome(capsys, "run", "--no-perplexity", "--json")[1])["error"]


def test_interrupt_and_a_refused_run_lose_no_earlier_record(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    earlier = tmp_path / "run.json"
    record.save(PASSED, earlier)
    kept = earlier.read_bytes()
    command = ("run", "--device", "host", "--no-perplexity", "--out", str(tmp_path))
    code, out, _ = outcome(capfd, *command, "-k", "no_such_check", "--json")
    assert (code, json.loads(out)["verdict"]) == (1, "FAIL: nothing was selected: no test matches -k no_such_check")
    assert earlier.read_bytes() == kept
    monkeypatch.setattr(subprocess, "run", interrupt)
    code, out, _ = outcome(capfd, *command, "--json")
    assert (code, json.loads(out)) == (130, {"error": "interrupted"})
    assert earlier.read_bytes() == kept


def test_damaged_record_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"api_version": 1, "outc')
    code, out, err = outcome(capsys, "report", str(path))
    assert (code, out) == (2, "")
    assert err.startswith(f"mxharness: run record {path} is damaged: ")


def test_list_and_info_print_parseable_json(capsys: pytest.CaptureFixture[str]) -> None:
    from mxharness.ops import OPS

    code, out, _ = outcome(capsys, "list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [op["name"] for op in listed["operators"]] == [op.name for op in OPS]
    assert all(op["cases"] > 0 and op["gates"] for op in listed["operators"])
    code, out, _ = outcome(capsys, "info", "--json")
    devices = {device["name"]: device for device in json.loads(out)["devices"]}
    assert code == 0
    assert set(devices) == {"host", "cuda"}
    assert all(device["present"] == (device["missing"] == "") for device in devices.values())


PASSED = record.RunRecord(
    device_class="host",
    arithmetic="tensor-core",
    started="2026-01-01T00:00:00Z",
    seconds=1.0,
    command="",
    selected=1,
    executed=1,
    outcomes=(
        Outcome(
            case="gemm-1x1x32-bf16-normal-s0", op="gemm", shape=(1, 1, 32), dtype="bf16", regime="normal",
            device="host", gate="bound", passed=True, elements=1, bad=0, nan=0, inf=0, ratio=0.5, max_ulp=0.5,
            nmse=1e-9, digest="0" * 16, inputs="0" * 16, message="",
        ),
    ),
    skipped=(record.Skip("perplexity", "left out", asked=True),),
)  # fmt: skip


@pytest.mark.parametrize(
    ("run", "code", "word"),
    [
        (PASSED, 0, "PASS: 1 of 1 checks"),
        (replace(PASSED, selected=2), 1, "FAIL: 1 of 2 selected checks"),
    ],
    ids=["all executed", "fewer executed than selected"],
)
def test_exit_code_follows_the_verdict(
    run: record.RunRecord, code: int, word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record.save(run, tmp_path / "run.json")
    ended, out, _ = outcome(capsys, "report", str(tmp_path / "run.json"))
    assert ended == code
    assert out.startswith(word)
    assert (tmp_path / "report.html").is_file()
