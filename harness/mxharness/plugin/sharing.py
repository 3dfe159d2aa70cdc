"""How worker processes share the tests, so that none is left with those that take the longest.

pytest-xdist hands out what lies together in the suites, a whole file of planted faults to one worker, and the longest
test last where it stands last.
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


def pytest_configure(config: pytest.Config) -> None:
    """Say what the mark is."""
    config.addinivalue_line("markers", "long(what=''): begins early, in the same worker as others with the same `what`")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, put the tests that plant faults among the checks, evenly spaced, and long ones before all others.

    Checks have no fixtures that are kept from one to the next, so it costs nothing to part them.
    """
    if hasattr(config, "workeroutput"):
        spaced = spread(items, _plants, lambda item: parameter(item, "gate") is not None)
        workers: int = config.workerinput["workercount"]  # type: ignore[attr-defined]  # xdist adds it
        items[:] = dealt(spaced, _long, workers)


def _plants(item: pytest.Item) -> bool:
    return "plant" in getattr(item, "fixturenames", ())


def _long(item: pytest.Item) -> str | None:
    """What long tests are kept together by, a test's own name where it stands alone; None for one that is not long."""
    mark = item.get_closest_marker("long")
    return None if mark is None else str(mark.args[0]) if mark.args else item.nodeid


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


def dealt(items: list[Item], group: Callable[[Item], str | None], shares: int) -> list[Item]:
    """The items in an order in which every share of them begins with some of the groups, dealt out one after another.

    pytest-xdist gives each worker its share of what lies together, all of one size, and others steal from its end.
    """
    groups: dict[str, list[Item]] = {}
    others: list[Item] = []
    for item in items:
        name = group(item)
        (others if name is None else groups.setdefault(name, [])).append(item)
    dealt_to: list[list[Item]] = [[] for _ in range(shares)]
    for index, members in enumerate(groups.values()):
        dealt_to[index % shares] += members
    found: list[Item] = []
    for index, first in enumerate(dealt_to):
        size = (len(items) - len(found)) // (shares - index)
        after = max(size - len(first), 0)
        found += [*first, *others[:after]]
        others = others[after:]
    return [*found, *others]
