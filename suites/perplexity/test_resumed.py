"""A measurement is kept on disk and resumed, and shared by processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mxharness import perplexity
from mxharness.errors import UserError
from mxharness.model import ranks, reference
from mxharness.model.checkpoint import Checkpoint
from mxharness.protocols import Span
from safetensors import safe_open
from safetensors.numpy import save_file

from .measuring import SAMPLE, measure, read


def test_a_killed_measurement_goes_on_where_it_was(toy: Checkpoint, tmp_path: Path) -> None:
    whole = measure(toy, batch=3)
    plain, calls = reference.float32(toy), []

    def killed(ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain.hidden_states(ids)

    with pytest.raises(KeyboardInterrupt):
        measure(toy, replace(plain, hidden_states=killed), batch=3, keep=perplexity.Keep(tmp_path))
    assert calls == [3, 3, 2]
    folder = tmp_path / "float32"
    (folder / "00000.safetensors").write_bytes(b"half a file")  # not by us: ours appear whole
    save_file({"nll": np.ones(1, np.float32)}, folder / "00002.safetensors")
    with pytest.raises(UserError, match="float32 holds a measurement; --resume goes on with it"):
        measure(toy, batch=3, keep=perplexity.Keep(tmp_path))
    resumed = replace(plain, hidden_states=lambda ids: (calls.append(len(ids)), plain.hidden_states(ids))[1])
    result = measure(toy, resumed, batch=3, keep=perplexity.Keep(tmp_path, resume=True))
    assert calls[3:] == [3, 2]  # the second batch was there
    assert result.nll.tobytes() == whole.nll.tobytes()
    assert sorted(path.name for path in folder.iterdir()) == ["measurement.json", "nll.safetensors"]
    with safe_open(folder / "nll.safetensors", framework="np") as file:
        assert file.get_tensor("nll").tobytes() == whole.nll.tobytes()
        assert [Span(*row) for row in file.get_tensor("windows").tolist()] == list(whole.spans)
        assert file.metadata()["ids_sha256"] == whole.ids_sha256
    again = measure(toy, resumed, batch=3, keep=perplexity.Keep(tmp_path, resume=True))
    assert (calls[5:], again.nll.tobytes(), again.tokens_per_second) == ([], whole.nll.tobytes(), 0)
    (folder / "nll.safetensors").write_bytes(b"half a file")
    again = measure(toy, resumed, batch=3, keep=perplexity.Keep(tmp_path, resume=True))
    assert (calls[5:], again.nll.tobytes()) == ([3, 3, 2], whole.nll.tobytes())


@pytest.mark.parametrize("what", ["model_sha256", "text_sha256", "ids_sha256", "protocol"])
def test_a_changed_experiment_is_not_resumed(toy: Checkpoint, tmp_path: Path, what: str) -> None:
    runner, keep = reference.float32(toy), perplexity.Keep(tmp_path, resume=True)
    perplexity.measure(read(toy), runner, windows=2, keep=keep)
    with pytest.raises(UserError, match=f"another measurement and cannot be resumed: {what} .* -> other"):
        perplexity.measure(replace(read(toy), **{what: "other"}), runner, windows=2, keep=keep)


def test_changed_kernels_or_windows_are_not_resumed(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, keep = replace(reference.float32(toy), name="kernels"), perplexity.Keep(tmp_path, resume=True)
    perplexity.measure(read(toy), runner, windows=2, keep=keep)
    with pytest.raises(UserError, match="cannot be resumed: windows 2 -> 3"):
        perplexity.measure(read(toy), runner, windows=3, keep=keep)
    monkeypatch.setattr(perplexity, "kernels_sha256", lambda: "other")
    with pytest.raises(UserError, match=r"cannot be resumed: kernels .* -> other"):
        perplexity.measure(read(toy), runner, windows=2, keep=keep)


SHARED = """
import sys
from pathlib import Path
from mxharness import perplexity, text
from mxharness.model import ranks, reference, toy
from mxharness.protocols import PROTOCOLS, Protocol
PROTOCOLS["toy"] = Protocol("toy", 32, 32, 17, 17, False, "")
with ranks.joined() as here:
    file = toy.checkpoint()
    reading = perplexity.read(file, text.Text("sample", "sample", sys.argv[2], "0" * 64), "toy")
    result = perplexity.measure(
        reading, reference.float32(file), batch=3, ranks=here, keep=perplexity.Keep(Path(sys.argv[1]))
    )
    Path(sys.argv[1], f"{here.rank} of {here.count}").write_bytes(result.nll.tobytes())
"""


@pytest.mark.long
def test_two_processes_have_the_bits_of_one(toy: Checkpoint, tmp_path: Path) -> None:
    """Three batches on two processes of torchrun's environment, gathered through gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            (sys.executable, "-c", SHARED, str(tmp_path), SAMPLE.text),
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = measure(toy, batch=3).nll.tobytes()
    torch.set_num_threads(threads)
    assert (tmp_path / "0 of 2").read_bytes() == (tmp_path / "1 of 2").read_bytes() == alone
    with safe_open(tmp_path / "float32" / "nll.safetensors", framework="np") as file:
        assert file.get_tensor("nll").tobytes() == alone


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes and CUDA_VISIBLE_DEVICES=3: each needs a GPU"), ranks.joined():
        pass
