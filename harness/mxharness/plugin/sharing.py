"""How worker processes share the tests, so that none is left with those that take the longest.

pytest-xdist hands out what lies together in the suites, a whole file of planted faults to one worker.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

import pytest

from mxharness.plugin.options import parameter

Item = TypeVar("Item")


@pytest.hookimpl(wrapper=True)  # a wrapper, to come before pytest-xdist, which makes its own choice where there is none
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """A worker that has run out of tests takes half of those that another has left, unless --dist says otherwise."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, put the tests that plant faults among the checks, evenly spaced.

    Checks have no fixtures that are kept from one to the next, so it costs nothing to part them.
    """
    if hasattr(config, "workeroutput"):
        items[:] = spread(items, _plants, lambda item: parameter(item, "gate") is not None)


def _plants(item: pytest.Item) -> bool:
    return "plant" in getattr(item, "fixturenames", ())


def spread(items: list[Item], slow: Callable[[Item], bool], among: Callable[[Item], bool]) -> list[Item]:
    """The items with the slow ones before those they are to be among, evenly spaced, otherwise in the same order."""
    others = [item for item in items if not slow(item)]
    places = [place for place, item in enumerate(others) if among(item)]
    moved = [item for item in items if slow(item)] if places else []
    if not moved:
        return items
    before: dict[int, list[Item]] = {}
    for index, item in enumerate(moved):
        before.setdefault(places[index * len(places) // len(moved)], []).append(item)
    return [item for place, other in enumerate(others) for item in (*before.get(place, ()), other)]
