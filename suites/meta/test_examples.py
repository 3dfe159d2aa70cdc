"""The examples and the README's commands: they do what they say."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
from mxharness import cli, compat, functional, mxfp4, nn, record

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def test_quantise_a_tensor_prints_every_rule_and_layout(capsys):
    runpy.run_path(str(EXAMPLES / "quantise_a_tensor.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*mxfp4.SCALE_RULES, *mxfp4.LAYOUTS]
    errors = {line.split()[0]: float(line.split()[1]) for line in lines if "error" in line}
    assert all(0.05 < error < 0.2 for error in errors.values())


def test_read_a_record_prints_the_verdict(capsys, monkeypatch, tmp_path):
    run = record.RunRecord(
        device_class="host", arithmetic="tensor-core", started="2026-01-01T00:00:00Z", seconds=1.0, command="",
        selected=1, executed=0,
    )  # fmt: skip
    record.save(run, tmp_path / "run.json")
    monkeypatch.setattr("sys.argv", ["read_a_record.py", str(tmp_path / "run.json")])
    runpy.run_path(str(EXAMPLES / "read_a_record.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("FAIL: no check executed")


def test_quantise_a_model_prints_what_it_costs(capsys):
    runpy.run_path(str(EXAMPLES / "quantise_a_model.py"), run_name="__main__")
    report, error = capsys.readouterr().out.splitlines()
    assert report.startswith("2 modules hold MXFP4: ")
    assert 0.05 < float(error.split()[0]) < 0.3


def test_the_page_of_functions_names_every_one():
    page = (ROOT / "docs" / "functions.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    functions = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    assert functions <= named
    assert set(nn.__all__) - {"QuantizationReport", "Left", "PackedModule", "Replaced"} <= named
    public = {name for name, value in vars(compat).items() if getattr(value, "__module__", "") == compat.__name__}
    assert {name for name in public if not name.startswith("_")} - {"quantization_accuracy"} <= named
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        exec(block, {})  # noqa: S102  our own page


def documented_commands():
    """The arguments of every line of the documents and of the example workflow that runs mxharness."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "examples/gate.yml")]
    lines = re.findall(r"^(?:- run: | |\.venv/bin/)*mxharness ([a-z].*)$", "\n".join(texts), re.MULTILINE)
    return sorted({line.partition("#")[0].strip() for line in lines})


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line):
    command, arguments = cli.commands, shlex.split(line)
    while isinstance(command, click.Group) and not (command.invoke_without_command and arguments[0].startswith("-")):
        assert arguments[0] in command.commands
        command, arguments = command.commands[arguments[0]], arguments[1:]
    assert command.make_context(line, arguments).command is command


def test_ci_runs_the_second_block_of_the_readme():
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "mxharness run" in blocks[0]
    assert "tox" in blocks[1]
    assert "count == 2" in (ROOT / ".ci" / "run").read_text()
