"""What the report says of a model: perplexity with its intervals, the gate, the sensitivity of its parts; and skips."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mxharness import plot, record, report
from mxharness.cli import main
from mxharness.commands import run as command
from mxharness.coverage import Coverage
from mxharness.record import OtherTests, Skip
from mxharness.report import head, model, sensitivity, skips

from .made import GOOD, HOSTILE, PERPLEXITY, Page, run

MEASURED = {
    **PERPLEXITY,
    "perplexity": 20.0,
    "perplexity_lower": 18.0,
    "perplexity_upper": 22.5,
    "change": -0.00013,
    "change_lower": -0.00029,
    "change_upper": 0.00004,
    "perplexity_decoded_float32": 20.2,
    "perplexity_original_float32": 10.1,
    "kl_lower": 1.0e-5,
    "kl_upper": 2.0e-5,
    "same_word": 0.9985,
    "gate": "pass",
    "tokens_scored": 2040,
    "command": "mxharness perplexity --model tiny",
}


def test_perplexity_stands_beside_float32_with_its_interval_and_the_gates_word() -> None:
    (found,) = model.models(replace(GOOD, perplexity=(MEASURED,)))
    assert [(way.perplexity, way.change) for way in found.ways] == [
        ("20 (18 to 22.5)", "-0.013% (-0.029% to +0.004%) against float32 on the same weights"),
        ("20.2", "+100.000% against the last row: what the format itself costs"),
        ("10.1", ""),
    ]
    assert found.ways[0].how == "the kernels: mxfp4, bf16 activations"
    facts = dict(found.facts)
    assert facts["KL divergence"] == "1.5e-05 (1e-05 to 2e-05) nats per token"
    assert (facts["Tokens scored"], facts["Same most probable word"]) == ("2,040", "99.85%")
    assert (found.passed, found.gate, found.command) == (True, "pass", "mxharness perplexity --model tiny")
    assert found.message == ("1.6e-3 relative, 5e-3 allowed",)
    assert found.more == (("text_sha256", "173c87a5"),)
    lines = Page(report.render(replace(GOOD, perplexity=(MEASURED,)))).lines
    assert {"gate: pass", "20 (18 to 22.5)", "mxharness perplexity --model tiny"} <= set(lines)
    (tile,) = [one for one in head.tiles(replace(GOOD, perplexity=(MEASURED,)), None) if one.title == "Perplexity"]
    assert (tile.value, tile.good) == ("20", True)
    assert tile.note == "gate: pass; -0.029% to +0.004% beside float32"


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"name": "m", "perplexity": math.nan, "passed": False, "message": "it broke; badly"}, "nan"),
        ({"name": "m", "perplexity": 9.5, "passed": True}, "9.5"),
        ({**MEASURED, "perplexity_lower": 0.0, "perplexity_upper": math.inf}, "20 (0 to inf)"),
        ({**PERPLEXITY, "gate": "inconclusive"}, "59.7537"),
    ],
)
def test_a_model_of_which_less_is_known_is_shown_all_the_same(row: dict[str, Any], shown: str) -> None:
    made = replace(GOOD, perplexity=(row,))
    (found,) = model.models(made)
    assert found.ways[0].perplexity == shown
    assert found.passed == bool(row["passed"])
    lines = Page(report.render(made)).lines
    assert shown in lines
    assert ("gate: inconclusive" in lines) == ("gate" in row and row["gate"] == "inconclusive")
    assert "Perplexity was not measured in this run." in Page(report.render(run(perplexity=()))).lines


# Sensitivity


def loss(name: str, kl: float | None, group: str = "roles", **fields: object) -> dict[str, object]:
    estimate = None if kl is None else {"mean": kl, "lower": kl - 0.02, "upper": 2 * kl, "standard_error": 0.1}
    return {
        "group": group,
        "name": name,
        "format": "MXFP4 floor",
        "weights": ["a", "b"],
        "parameters": 4096,
        "fell_back": {},
        "kl": estimate,
        "log_perplexity": estimate,
        "same_word": 0.9,
        "missing": "" if kl else "gguf is not installed",
        **fields,
    }


DOCUMENT = {
    "model": HOSTILE,
    "text": "prose",
    "protocol": "windows of 512",
    "windows": 8,
    "windows_available": 53,
    "tokens_scored": 2040,
    "perplexity_float32": 26.5,
    "stored_in_mxfp4": ["q"],
    "losses": [
        loss("cheap", 0.01),
        loss("dear", 0.5, fell_back={"F16": ["a"]}),
        loss("layer 0", 0.1, "layers"),
        loss("Q4_K", None, "formats"),
    ],
}


def written(path: Path, document: object = DOCUMENT) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_parts_are_ranked_drawn_and_said_in_words(tmp_path: Path) -> None:
    found = sensitivity.read(written(tmp_path / "s.json"))
    assert [[part.name for part in group.parts] for group in found.groups] == [["dear", "cheap"], ["layer 0"]]
    dear, cheap = found.groups[0].parts
    assert (dear.kl, dear.note) == (sensitivity.Interval(0.5, 0.48, 1.0), "1 of 2 weights in F16")
    assert cheap.moved.mean == pytest.approx(math.expm1(0.01))
    assert found.missing == (("Q4_K", "gguf is not installed"),)
    drawing = found.groups[0].drawing
    assert "dear 0.5, 0.48 to 1; cheap 0.01, 0 to 0.02" in drawing, "a reader who sees nothing hears the numbers"
    tall, short = (float(width) for width in _widths(drawing))
    assert tall / short == pytest.approx(50, rel=1e-3)
    lines = Page(report.render(GOOD, sensitivity=found)).lines
    part = lines[lines.index("Sensitivity of roles and layers") :]
    row = part.index("dear", part.index("same word"))
    assert part[row : row + 6] == ["dear", "MXFP4 floor", "4,096", "0.5", "0.48", "1"]
    assert any(line.endswith("8 of 53 windows, 2,040 tokens scored.") for line in part)
    assert "Not measured: Q4_K: gguf is not installed." in part
    assert any(line.startswith("1 weight is MXFP4 in the file") for line in part)
    assert "Sensitivity" not in Page(report.render(GOOD)).lines


def _strokes(svg: str) -> list[str]:
    """Every whisker."""
    return re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--ink\)', svg)


def _widths(svg: str) -> list[float]:
    """Of every bar, in the order of the panel."""
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*"[^>]*fill: var\(--series-1\)', svg)
    return [float(right) - float(left) for left, right in bars]


def test_one_window_has_no_interval_to_draw(tmp_path: Path) -> None:
    open_ended = loss("whole", 0.5)
    open_ended["kl"] = {"mean": 0.5, "lower": "-inf", "upper": "inf", "standard_error": "inf"}
    found = sensitivity.read(written(tmp_path / "s.json", {**DOCUMENT, "losses": [open_ended]}))
    assert "whole 0.5, 0 to inf" in found.groups[0].drawing
    point, none = (plot.bars_svg("t", [plot.Bar("x", 0.5, -1, high)], "y") for high in (0.5, math.inf))
    assert point.count("<use ") == none.count("<use ") + 2, "an interval has two ends"
    far, near = (_strokes(plot.bars_svg("t", [plot.Bar("x", 0.5, low, 0.6)], "y")) for low in (-9.0, 0.0))
    assert far == near, "none reaches below zero"


def test_a_report_finds_what_lies_beside_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.save(GOOD, tmp_path / "run.json")
    written(tmp_path / sensitivity.FILE)
    other = {**DOCUMENT, "losses": [loss("elsewhere", 0.5)]}

    def page(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path / "run.json"), "--out", str(tmp_path / "out"), *arguments])
        assert ended.value.code == 0, capsys.readouterr().err
        return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    assert ">dear<" in page()
    named = page("--sensitivity", str(written(tmp_path / "other" / "s.json", other)))
    assert ">elsewhere<" in named
    assert ">dear<" not in named
    report.write(GOOD, tmp_path)
    assert ">dear<" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_keeps_the_file_beside_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "execute", lambda *_: GOOD)
    given = written(tmp_path / "given.json")
    for arguments in (["--sensitivity", str(given)], []):
        with pytest.raises(SystemExit) as ended:
            main(["run", "--out", str(tmp_path / "out"), *arguments])
        assert ended.value.code == 0
        assert ">dear<" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / sensitivity.FILE).read_bytes() == given.read_bytes()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "is not what"),
        ("{", "is no JSON"),
        (None, "cannot read"),
        (json.dumps({**DOCUMENT, "losses": 3}), "is not what"),
        (json.dumps({**DOCUMENT, "losses": [{**loss("x", 0.1), "kl": {"mean": 1}}]}), "is not what"),
    ],
)
def test_a_file_that_is_no_sensitivity_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, why: str
) -> None:
    record.save(GOOD, tmp_path / "run.json")
    if text is not None:
        (tmp_path / "s.json").write_text(text)
    given = ["--sensitivity", str(tmp_path / "s.json")]
    for arguments in (["report", str(tmp_path / "run.json")], ["run", "--device", "host", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *given])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / sensitivity.FILE).exists()


# What did not run


def test_skips_stand_by_their_reason_and_a_narrowed_run_says_what_it_left_out() -> None:
    made = replace(
        GOOD,
        skipped=(Skip("a", "no GPU"), Skip("b", "no GPU", count=3), Skip("perplexity", "left out", asked=True)),
        tests=OtherTests(5, 0, 2),
        filters=("--quick",),
        coverage=Coverage("0", 100, selected=("x", "y")),
    )
    assert skips.groups(made) == [
        skips.Group("no GPU", False, 4, ("a", "b")),
        skips.Group("left out", True, 1, ("perplexity",)),
        skips.Group("skipped by their suite", False, 2, ("other tests",)),
    ]
    assert skips.narrowed(made) == ["The run was limited by --quick: 98 tests of 100 were not selected."]
    (tile,) = [one for one in head.tiles(made, None) if one.title == "Skipped"]
    assert (tile.value, tile.note) == ("7", "98 not selected")
    assert skips.narrowed(replace(made, coverage=None)) == ["The run was limited by --quick."]
    assert skips.narrowed(GOOD) == []
    assert skips.unselected(replace(made, filters=())) == 0, "a shard lost is no choice"
    lines = Page(report.render(made)).lines
    assert {"no GPU", "left out", *skips.narrowed(made)} <= set(lines)
    assert "Nothing was skipped." not in lines
    alone = Page(report.render(replace(made, skipped=(), tests=OtherTests()))).lines
    assert "Nothing was skipped." not in alone
