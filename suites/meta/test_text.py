"""Texts: WikiText-2 by its hash and never by its name, the embedded text where it is out of reach."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import text
from mxharness.errors import Unavailable, UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no WikiText-2, no hub."""
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MXHARNESS_WIKITEXT", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


ROWS = ["", " = Robert Boulter = \n", "", " Robert is an actor , naïve in 2004 . \n", ""]
LINES = " \n = Robert Boulter = \n \n Robert is an actor , naïve in 2004 . \n \n"


def test_rows_become_the_original_lines() -> None:
    assert text.join_rows(ROWS) == LINES


def test_a_parquet_and_a_text_file_give_one_text(folder: Path) -> None:
    pytest.importorskip("datasets", reason="not measured: reading texts through datasets")
    import pandas as pd

    pd.DataFrame({"text": ROWS}).to_parquet(folder / "rows.parquet")
    (folder / "wiki.test.raw").write_bytes(LINES.encode())
    rows, lines = (text.load_text(str(folder / name)) for name in ("rows.parquet", "wiki.test.raw"))
    digest = hashlib.sha256(LINES.encode()).hexdigest()
    assert rows.text == lines.text == LINES
    assert rows.sha256 == lines.sha256 == digest
    assert lines.label == f"wiki.test.raw, sha256 {digest[:12]} (not WikiText-2)"  # the name makes it nothing
    pd.DataFrame({"words": ROWS}).to_parquet(folder / "other.parquet")
    with pytest.raises(UserError, match="cannot be read as a parquet file with a column 'text'"):
        text.load_text(str(folder / "other.parquet"))


def test_the_hash_makes_a_text_wikitext(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="not measured: reading texts through datasets")
    path = folder / "anything.txt"
    path.write_bytes(LINES.encode())
    monkeypatch.setenv("MXHARNESS_WIKITEXT", str(path))
    for source in ("auto", "wikitext-2"):
        with pytest.raises(UserError, match=r"MXHARNESS_WIKITEXT names .*anything.txt, whose text has sha256"):
            text.load_text(source)
    monkeypatch.setattr(text, "WIKITEXT2_SHA256", hashlib.sha256(LINES.encode()).hexdigest())
    for source in ("auto", "wikitext-2", str(path)):
        assert text.load_text(source).label == "WikiText-2 raw test"
    monkeypatch.setenv("MXHARNESS_WIKITEXT", str(folder / "gone"))
    with pytest.raises(UserError, match="and there is no such file"):
        text.load_text("auto")


def test_the_hubs_rows_are_checked_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="not measured: reading texts through datasets")
    asked = []

    def load_dataset(*names: str, split: str) -> dict[str, list[str]]:
        asked.append((*names, split))
        return {"text": ROWS}

    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(Unavailable, match="WikiText-2's raw test split has 173c87a5"):
            text.load_text("wikitext-2")
        assert not (folder / "cache" / "wiki.test.raw").exists()
        patch.setattr(text, "WIKITEXT2_SHA256", hashlib.sha256(LINES.encode()).hexdigest())
        assert text.load_text("wikitext-2").label == "WikiText-2 raw test"
        assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")] * 2
    monkeypatch.setattr(text, "WIKITEXT2_SHA256", hashlib.sha256(LINES.encode()).hexdigest())
    assert text.load_text("wikitext-2") == text.Text(
        "wikitext-2", "WikiText-2 raw test", LINES, hashlib.sha256(LINES.encode()).hexdigest()
    )


def test_without_a_hub_the_embedded_text_stands_in_and_says_so(folder: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"http://127.0.0.1:9 is out of reach .* and MXHARNESS_WIKITEXT names no file"
    ):
        text.load_text("wikitext-2")
    found = text.load_text("auto")
    assert found.name == "default"
    assert "not WikiText-2" in found.label
    assert "out of reach" in found.note
    assert replace(found, note="") == text.load_text("default")
    assert len(found.text.encode()) == 65_470
    with pytest.raises(UserError, match="no text 'wikitext'; there are auto, wikitext-2, default"):
        text.load_text("wikitext")
