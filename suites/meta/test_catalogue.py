"""Commands that only look import no torch; what they tell is kept, and told anew after an edit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mxharness import catalogue
from mxharness.device import cuda, presence

LOOKS = """
import json, sys
from mxharness.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        heavy = [name for name in ("torch", "hypothesis", "matplotlib") if name in sys.modules]
        print(arguments, ended.code, heavy, file=sys.stderr)
"""
COMMANDS = (["--help"], ["list"], ["list", "--json"], ["info"], ["baseline", "list"], ["baseline", "history", "sm_90"],
            ["baseline", "show", "sm_90/v0.4.0"], ["manifest", "--help"])  # fmt: skip


def test_to_look_takes_no_torch():
    catalogue.catalogue()  # kept from here on
    command = [sys.executable, "-P", "-c", LOOKS, json.dumps(COMMANDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{command} 0 []" for command in COMMANDS]


def test_what_is_kept_is_what_there_is():
    assert catalogue.catalogue() == catalogue.gathered()


def test_it_is_gathered_again_after_an_edit_alone(monkeypatch, tmp_path):
    edits, gathered = ["one", "one", "two"], []
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path))
    monkeypatch.setattr(catalogue, "digest", lambda root: edits.pop(0))
    monkeypatch.setattr(catalogue, "gathered", lambda: gathered.append(1) or {"operators": len(gathered)})
    assert [catalogue.catalogue()["operators"] for _ in range(3)] == [1, 1, 2]


def test_an_edit_a_new_name_and_a_new_file_are_edits(tmp_path):
    (tmp_path / "ops").mkdir()
    seen = [catalogue.digest(tmp_path)]
    (tmp_path / "ops" / "gemm.py").write_text("CASES = ()")
    seen.append(catalogue.digest(tmp_path))
    (tmp_path / "ops" / "gemm.py").write_text("CASES = (1,)")
    seen.append(catalogue.digest(tmp_path))
    (tmp_path / "ops" / "gemm.py").rename(tmp_path / "gemm.py")
    seen.append(catalogue.digest(tmp_path))
    assert len(set(seen)) == 4


def test_without_a_cache_it_is_gathered_every_time(monkeypatch):
    monkeypatch.setenv("MXHARNESS_CACHE", "/dev/null/cache")
    monkeypatch.setattr(catalogue, "gathered", lambda: {"operators": 7})
    assert catalogue.catalogue() == {"operators": 7}


def test_devices_are_told_as_torch_would():
    assert presence.cuda() == cuda.missing()


@pytest.mark.parametrize(
    ("build", "gpu", "lacks"),
    [
        (None, False, "this torch is a CPU build"),
        ("13.0", False, "torch finds no GPU or driver"),
        ("13.0", True, "pip install 'mxharness[cuda]'"),
    ],
)
def test_what_a_gpu_run_lacks_is_said(build, gpu, lacks, monkeypatch):
    monkeypatch.setattr(presence, "find_spec", lambda name: None)
    assert lacks in presence.cuda_lacks(build, gpu=gpu)


def test_a_missing_torch_is_missed_whatever_is_kept(monkeypatch):
    catalogue.catalogue()
    monkeypatch.setattr(presence, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="'torch'"):
        catalogue.catalogue()
