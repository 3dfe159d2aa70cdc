"""The cache of what was compiled: built once however many ask at once, whole or not there, and left tidy."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from mxharness.device import host
from mxharness.device.source import compiled, shipped
from mxharness.device.toolchain import compiler_version
from mxharness.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path))
    return tmp_path


def test_of_many_who_want_a_file_one_builds_it(cache):
    built = []
    together = Barrier(8)

    def build(out):
        built.append(out)
        time.sleep(0.2)  # the others come meanwhile
        out.write_text("once")

    def ask(_):
        together.wait()
        return compiled("kind", ".txt", ("key",), build)

    with ThreadPoolExecutor(8) as pool:
        (path,) = set(pool.map(ask, range(8)))
    assert path.read_text() == "once"
    assert len(built) == 1
    assert list((cache / "kind").iterdir()) == [path]


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(cache):
    def fail(out):
        out.write_text("half")
        raise UserError("does not compile")

    for _ in range(2):
        with pytest.raises(UserError, match="does not compile"):
            compiled("kind", ".txt", ("key",), fail)
    assert list((cache / "kind").iterdir()) == []
    assert compiled("kind", ".txt", ("key",), lambda out: out.write_text("whole")).read_text() == "whole"


def test_the_systems_headers_are_read_precompiled_to_the_same_library(cache, monkeypatch):
    if "clang" in compiler_version():
        pytest.skip("clang: not tried: GCC's precompiled headers")
    commands = []
    build = host._build
    monkeypatch.setattr(host, "_build", lambda command, *rest: commands.append(command) or build(command, *rest))
    path = host.compile_library(shipped(), "dequant.cu", fast=False, optimised=False)
    with_precompiled = path.read_bytes()
    (precompiled,) = (cache / "host").glob("*.gch")
    reads = [command[command.index("-x") + 1] for command in commands if "-x" in command]  # but for the runtime's own
    assert reads == ["c++-header", "c++"]
    assert precompiled.with_suffix("") == Path(commands[-1][commands[-1].index("-include") + 1])
    path.unlink()
    monkeypatch.setattr(host, "_system_headers", lambda folder, flags: [])
    host.compile_library(shipped(), "dequant.cu", fast=False, optimised=False)
    assert path.read_bytes() == with_precompiled
