"""A quick start: what is imported and collected is kept to the end, so nobody looks for garbage among it.

Looking through it again and again, as Python's collector does while memory grows, is a third of the start. And a GPU's
kernels are all compiled at once, while workers start.
"""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mxharness.device import Device

_COLLECTS = pytest.StashKey[bool]()
"""Whether Python looked for garbage before."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Do not look for garbage while modules are imported and tests are collected."""
    config.stash[_COLLECTS] = gc.isenabled()
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Look again, but only among what the tests themselves leave behind."""
    gc.freeze()
    _restore(session.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Look again, also where no test was run."""
    _restore(config)


def _restore(config: pytest.Config) -> None:
    if config.stash[_COLLECTS]:
        gc.enable()


def compile_kernels(device: Device) -> None:
    """Begin to compile every file of kernels for a GPU, all at once; who needs one waits for that one alone.

    What does not compile is told by whoever launches it.
    """
    from mxharness.device import cuda

    if not isinstance(device, cuda.CudaDevice):
        return
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    for name in device.sources.names():
        pool.submit(cuda.compile_cubin, device.sources, name, device.architecture)
    pool.shutdown(wait=False)
