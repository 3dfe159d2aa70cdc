"""A quick start: what is imported and collected is kept to the end, so nobody looks for garbage among it.

Looking through it again and again, as Python's collector does while memory grows, is a third of the start.
"""

from __future__ import annotations

import gc

import pytest

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
