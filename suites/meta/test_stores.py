"""Where baselines lie: whatever happens in the middle, a reader gets one writer's texts, all of them."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from mxharness.errors import UserError
from mxharness.stores import Store, objects, open_store

OLD = {"environment": "old", "gemm": "old"}
NEW = {"environment": "new", "gemm": "new", "mma": "new"}


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store's address."""
    name = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://team/{name}"
    return {
        "folder": str(tmp_path / name),
        "file": f"file://{tmp_path / name}",
        "memory": f"memory://{name}/baselines",
    }[request.param]


@pytest.fixture(scope="session")
def bucket() -> Iterator[None]:
    """A bucket "team" of a local S3 server; skipped where moto's server and s3fs are not installed."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "local")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="team")
    yield
    patch.undo()
    server.stop()


def test_what_is_written_is_read_listed_and_taken_away(root: str) -> None:
    store = open_store(root)
    assert store.names() == []
    assert store.read("host", "main") is None
    place = store.write("host", "main", OLD, replace=False)
    assert str(place) == str(store.place("host", "main"))
    store.write("sm_90", "v1.0", NEW, replace=False)
    again = open_store(root)
    assert again.names() == [("host", "main"), ("sm_90", "v1.0")]
    assert again.read("host", "main") == OLD
    assert again.read("sm_90", "v1.0") == NEW
    again.remove("host", "main")
    again.remove("host", "main")
    assert again.names() == [("sm_90", "v1.0")]
    assert again.read("host", "main") is None


def test_a_taken_name_is_kept_and_a_replaced_one_keeps_no_old_file(root: str) -> None:
    store = open_store(root)
    store.write("host", "main", NEW, replace=False)
    with pytest.raises(UserError, match="host/main exists; --replace"):
        store.write("host", "main", OLD, replace=False)
    assert store.read("host", "main") == NEW
    store.write("host", "main", OLD, replace=True)
    assert store.read("host", "main") == OLD


def test_of_two_writers_of_a_new_name_one_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look before either writes; the second finds out when it publishes."""
    first, second = open_store(root), open_store(root)
    refused, done = [], []
    barrier = threading.Barrier(2, timeout=20)

    def write(store: Store, texts: dict[str, str]) -> None:
        barrier.wait()
        try:
            store.write("host", "main", texts, replace=False)
            done.append(texts)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=pair) for pair in ((first, OLD), (second, NEW))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(refused) == 1
    assert "exists" in refused[0]
    assert open_store(root).read("host", "main") == done[0]


def test_readers_beside_a_writer_see_one_writers_texts(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    versions = [{f"part{i}": str(version) for i in range(6)} for version in range(40)]
    store.write("host", "main", versions[0], replace=False)
    seen: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(open_store(tmp_path).read("host", "main"))

    reader = threading.Thread(target=read)
    reader.start()
    for version in versions[1:]:
        store.write("host", "main", version, replace=True)
    stop.set()
    reader.join()
    assert len(seen) > 5
    assert all(texts in versions for texts in seen)


KILLED = """
import os, signal, sys
from pathlib import Path
from mxharness.stores import open_store
at, count, rename = int(sys.argv[2]), 0, Path.rename
def killed(self, target):
    global count
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return rename(self, target)
Path.rename = killed
open_store(sys.argv[1]).write("host", "main", {"environment": "new"}, replace=True)
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_writer_that_is_killed_loses_nothing(tmp_path: Path, renames: int) -> None:
    """Before the old folder is moved away, and between that and the new one's coming in its place."""
    store = open_store(tmp_path)
    store.write("host", "main", OLD, replace=False)
    done = subprocess.run((sys.executable, "-P", "-c", KILLED, str(tmp_path), str(renames)), check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "host" / "main").is_dir() == (renames == 0)
    assert store.read("host", "main") == OLD
    assert store.names() == [("host", "main")]
    with pytest.raises(UserError, match="exists"):
        store.write("host", "main", NEW, replace=False)
    store.write("host", "other", NEW, replace=False)
    assert sorted(path.name for path in (tmp_path / "host").iterdir()) == ["main", "other"]
    assert store.read("host", "main") == OLD


def test_a_full_disk_leaves_the_old_baseline_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.write("host", "main", OLD, replace=False)
    write_text = Path.write_text

    def full(self: Path, text: str, **options: str) -> int:
        if self.stem == "mma":
            raise OSError(28, "No space left on device", str(self))
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        store.write("host", "main", NEW, replace=True)
    assert store.read("host", "main") == OLD
    assert [path.name for path in (tmp_path / "host").iterdir()] == ["main"]


def test_a_writer_waits_for_the_one_before(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("host", "main", OLD, replace=False)
    holder = subprocess.Popen(
        (
            sys.executable,
            "-c",
            f"import fcntl, os, time; h = os.open({str(tmp_path / 'host')!r}, os.O_RDONLY);"
            "fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
        ),
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    writer = threading.Thread(target=store.write, args=("host", "main", NEW), kwargs={"replace": True})
    writer.start()
    time.sleep(0.2)
    assert (tmp_path / "host" / "main" / "gemm.json").read_text() == "old"
    holder.kill()  # a lock ends with its holder, however that ends
    holder.wait()
    holder.stdout.close()
    writer.join(20)
    assert store.read("host", "main") == NEW


# Object stores


def _stored() -> objects.Objects:
    store = open_store(f"memory://{uuid.uuid4().hex}/baselines")
    assert isinstance(store, objects.Objects)
    store.write("host", "main", OLD, replace=False)
    return store


def test_an_interrupt_before_the_pointer_leaves_the_old_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _stored()
    pipe_file = type(store.fs).pipe_file

    def interrupted(self: object, path: str, value: bytes, **options: str) -> object:
        if "/objects/" not in path:
            raise KeyboardInterrupt
        return pipe_file(self, path, value, **options)

    monkeypatch.setattr(type(store.fs), "pipe_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("host", "main", NEW, replace=True)
    assert store.read("host", "main") == OLD
    assert len(store.fs.glob(f"{store.path}/objects/*.json")) == 2


def test_what_an_object_store_holds_is_checked_against_its_name() -> None:
    store = _stored()
    (place,) = store.fs.glob(f"{store.path}/objects/*.json")
    body = store.fs.cat_file(place)
    store.fs.pipe_file(place, body.replace(b"old", b"odd"))
    with pytest.raises(UserError, match="is damaged: its content is not what its name says"):
        store.read("host", "main")
    store.fs.rm_file(place)
    with pytest.raises(UserError, match=r"is damaged: .* is missing"):
        store.read("host", "main")


@pytest.mark.parametrize(
    ("pointer", "says"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b'{"api_version": 9, "sha256": ""}', "reads up to 1"),
        (b'{"api_version": 1, "sha256": "../x"}', "names no sha256"),
    ],
)
def test_a_damaged_or_newer_pointer_is_refused(pointer: bytes, says: str) -> None:
    store = _stored()
    store.fs.pipe_file(f"{store.path}/host/main.json", pointer)
    with pytest.raises(UserError, match=says) as caught:
        store.read("host", "main")
    assert "host/main.json" in str(caught.value)


def test_an_object_of_a_newer_version_is_refused() -> None:
    store = _stored()
    body = json.dumps({"api_version": 9, "files": {}}).encode()
    digest = hashlib.sha256(body).hexdigest()
    store.fs.pipe_file(f"{store.path}/objects/{digest}.json", body)
    pointer = json.dumps({"api_version": 1, "sha256": digest}).encode()
    store.fs.pipe_file(f"{store.path}/host/main.json", pointer)
    with pytest.raises(UserError, match="reads up to 1"):
        store.read("host", "main")


def test_only_old_objects_that_no_baseline_names_are_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _stored()
    store.write("host", "kept", NEW, replace=False)
    store.remove("host", "main")
    assert len(store.fs.glob(f"{store.path}/objects/*.json")) == 2  # a writer may be about to name it
    monkeypatch.setattr(objects, "UNREACHED", timedelta(0))
    store.remove("host", "main")
    assert len(store.fs.glob(f"{store.path}/objects/*.json")) == 1
    assert store.read("host", "kept") == NEW


def test_one_that_was_replaced_in_the_meantime_is_not_replaced(bucket: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"s3://team/{uuid.uuid4().hex}"
    store, other = open_store(root), open_store(root)
    assert isinstance(store, objects.Objects)
    store.write("host", "main", OLD, replace=False)
    info = store.fs.info
    raced = []

    def slow(path: str, **options: object) -> object:
        found = info(path, **options)
        if not raced:
            raced.append(path)
            other.write("host", "main", NEW, replace=True)
        return found

    monkeypatch.setattr(store.fs, "info", slow)
    with pytest.raises(UserError, match="somebody else has just replaced"):
        store.write("host", "main", {"environment": "third"}, replace=True)
    monkeypatch.undo()
    assert store.read("host", "main") == NEW


def test_a_service_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _stored()

    def down(*arguments: object, **options: object) -> None:
        raise RuntimeError("no credentials\nand a long story")

    for name in ("cat_file", "glob", "exists"):
        monkeypatch.setattr(type(store.fs), name, down)
    for call in (lambda: store.read("host", "main"), store.names, lambda: store.write("host", "x", OLD, replace=True)):
        with pytest.raises(UserError, match=r"^cannot use the baselines at memory://\w+/baselines: no credentials$"):
            call()


def test_a_protocol_that_is_not_there_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"cannot open nosuch://x: .*mxharness\[remote\]"):
        open_store("nosuch://x")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("host", "main", OLD, replace=False)
    (tmp_path / "host" / "main" / "gemm.json").unlink()
    (tmp_path / "host" / "main" / "gemm.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read baseline .*gemm.json: Is a directory"):
        store.read("host", "main")
