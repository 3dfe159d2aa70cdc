"""Where the numbers of a run come from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from mxharness import environment
from mxharness.device import toolchain


def test_the_environment_names_what_is_absent_and_hashes_every_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "gemm.cu").write_text("one")
    (tmp_path / "host" / "runtime.cpp").write_text("two")
    (tmp_path / "notes.txt").write_text("three")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path)
    toolchain.compiler.cache_clear()
    facts = environment.describe(sources=tmp_path, flags=("-O2", "-I/somewhere"))
    assert [facts[name] for name in ("device", "gpu", "driver", "nvcc", "c++", "commit")] == ["absent"] * 6
    assert facts["compile flags"] == "-O2"
    hashed = {name: value for name, value in facts.items() if name.startswith("kernels/")}
    assert hashed == {"kernels/gemm.cu": "7692c3ad3540bb80", "kernels/host/runtime.cpp": "3fc4ccfe745870e2"}


def test_the_commit_says_when_the_tree_differs_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(("git", "-C", str(tmp_path), *identity, *arguments), check=True, capture_output=True)  # noqa: S607

    assert environment.commit(None) == "absent"
    git("init", "-q")
    assert environment.commit(tmp_path) == "absent"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    clean = environment.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == f"{clean}+dirty"
