"""`mxharness quantize` writes a file whole or not at all, in little memory; the command."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mxharness import mxfp4
from mxharness.cli import main
from mxharness.errors import UserError
from mxharness.model import gguf_file, toy
from mxharness.model.quantising import quantise
from mxharness.mxfp4 import Quantized


def test_nothing_is_written_over(tmp_path: Path) -> None:
    model = toy.checkpoint()
    path = tmp_path / "toy.gguf"
    quantise(model, path)
    content = path.read_bytes()
    (tmp_path / "link.gguf").symlink_to(path)
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("toy.gguf", "link.gguf", "dangling.gguf", "folder"):
        with pytest.raises(UserError, match=f"{name} is there already and is not written over"):
            quantise(path, tmp_path / name)
    with pytest.raises(UserError, match=r"no folder .*gone to write out.gguf to"):
        quantise(path, tmp_path / "gone" / "out.gguf")
    assert path.read_bytes() == content
    assert sorted(one.name for one in tmp_path.iterdir()) == ["dangling.gguf", "folder", "link.gguf", "toy.gguf"]


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_an_error_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = toy.checkpoint()
    real, calls = mxfp4.quantize, iter(range(100))

    def failing(*arguments: object) -> Quantized:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(mxfp4, "quantize", failing)
    with pytest.raises(KeyboardInterrupt):
        quantise(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no 1[\d,]+ bytes can be written: File too large"):
            quantise(toy.checkpoint(), tmp_path / "full.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys, time
from pathlib import Path
from mxharness import mxfp4
from mxharness.model import toy
from mxharness.model.quantising import quantise
mxfp4.quantize = lambda *a: (print("working", flush=True), time.sleep(60))
quantise(toy.checkpoint(), Path(sys.argv[1]))
"""


@pytest.mark.long
def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed.gguf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "working\n"
        assert len(list(tmp_path.iterdir())) == 1
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


GREEDY = """
import resource, sys
from pathlib import Path
from mxharness.model import toy
from mxharness.model.quantising import quantise
folder = Path(sys.argv[1])
quantise(toy.checkpoint(), folder / "small.gguf")
quantise(folder / "small.gguf", folder / "warm.gguf")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantise(folder / "large.gguf", folder / "out.gguf")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    slots = [
        gguf_file.slot("token_embd.weight", (120_000, 1024), "F32"),
        gguf_file.slot("blk.0.ffn_up_exps.weight", (8, 2048, 1024), "F32"),
    ]
    head, offsets = gguf_file.header([], slots)
    with (tmp_path / "large.gguf").open("wb") as file:
        file.write(head)
        file.truncate(offsets[-1] + slots[-1].nbytes)
    child = subprocess.run(
        [sys.executable, "-c", GREEDY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    mebibytes = int(child.stdout) / 1024
    assert mebibytes < 300, f"{mebibytes:.0f} MiB for a file of 533 MiB whose largest tensor has 469"


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantise(toy.checkpoint(), tmp_path / "in.gguf", only=["*ffn_up*"])
    arguments = (str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf"), "--skip", "*ffn_gate*", "--scale-rule", "even")
    code, out, _ = run(capsys, *arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["rules"] == "mxfp4 (even, even)"
    assert document["after"] == (tmp_path / "out.gguf").stat().st_size
    rows = {row["name"]: row for row in document["tensors"]}
    assert rows["blk.0.ffn_gate.weight"]["why"] == "skipped"
    assert rows["blk.0.ffn_up.weight"]["why"] == "as stored"
    assert 15 < rows["blk.0.attn_q.weight"]["sqnr"] < 25
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "out.gguf is there already" in err
    code, out, err = run(capsys, str(tmp_path / "in.gguf"), str(tmp_path / "folder"))
    assert code == 0
    assert "12 of 20 tensors quantised" in out
    assert "SQNR of all together" in out
    assert "100%" in err  # the bar
