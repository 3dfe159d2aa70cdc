"""The wheel: what is in it, and that it does the same outside a checkout as inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.parser import Parser
from pathlib import Path

import pytest
from mxharness import record

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ("kernels", "suites", "baselines", "reports")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built now."""
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the wheel's content, before any other mxharness."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A project that breaks any pytest, and any Python, that takes something from the working directory."""
    (tmp_path / "conftest.py").write_text("raise RuntimeError('a conftest that is none of our business')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    for module in ("torch", "kernels", "suites", "mxharness"):
        (tmp_path / f"{module}.py").write_text(f"raise RuntimeError('{module}.py of the working directory')\n")
    return tmp_path


def python(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the wheel in front of its path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTEST_ADDOPTS": "--no-such-option"}
    command = (sys.executable, "-P", *arguments)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_wheel_holds_one_package_and_the_bundle(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"mxharness"}
    assert "mxharness/py.typed" in names
    assert not [name for name in names if name.endswith(".pyc") or "/meta/" in name]
    for folder in BUNDLED:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted = {
            f"mxharness/_bundle/{path.relative_to(ROOT).as_posix()}" for path in files if "meta" not in path.parts
        }
        assert wanted == {name for name in names if name.startswith(f"mxharness/_bundle/{folder}/")}


def test_kernels_hold_no_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        bundled = [name for name in archive.namelist() if name.startswith("mxharness/_bundle/kernels/")]
    assert any(name.endswith(".cu") for name in bundled)
    assert not [name for name in bundled if name.endswith(".py")]
    assert not list((ROOT / "kernels").rglob("*.py"))


def test_wheel_never_asks_for_torch_and_carries_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed
    assert not [line for line in needed if line.startswith("torch")]
    assert "Apache License" in licence
    assert {"cuda", "model", "peers", "test"} <= set(metadata.get_all("Provides-Extra", []))


def test_run_of_the_wheel_in_a_hostile_project(installed: Path, hostile: Path) -> None:
    main = "import sys; from mxharness.cli import main; main(sys.argv[1:])"
    arguments = ("run", "--device", "host", "--op", "dequant", "--quick", "--no-perplexity", "--out", "out")
    ran = python(installed, hostile, "-c", main, *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = record.load(hostile / "out" / "run.json")
    assert found.executed == found.selected > 0
    assert {outcome.op for outcome in found.outcomes} == {"dequant"}
    assert record.verdict(found).passed
    assert (hostile / "out" / "report.html").stat().st_size > 0
    assert {path.name for path in hostile.iterdir() if path.is_dir()} == {"out"}


def test_node_ids_are_the_same_in_the_wheel_and_in_the_checkout(installed: Path, hostile: Path) -> None:
    collect = """
import sys, pytest
from pathlib import Path
from mxharness import paths
from mxharness.commands.running import Request, pytest_arguments
if len(sys.argv) > 1:
    paths.root = lambda: Path(sys.argv[1])
sys.exit(pytest.main([*pytest_arguments(Request(out=Path("out")), "host"), "--collect-only"]))
"""
    clean = f"import os; os.environ.pop('PYTEST_ADDOPTS', None)\n{collect}"
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda root: python(installed, hostile, "-c", clean, *root), ((), (str(ROOT),)))
    from_wheel, from_checkout = runs
    ids = [line for line in from_wheel.stdout.splitlines() if "::" in line]
    assert from_wheel.returncode == 0, from_wheel.stdout + from_wheel.stderr
    assert len(ids) > 0
    assert ids == [line for line in from_checkout.stdout.splitlines() if "::" in line]
