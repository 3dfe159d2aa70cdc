"""The bits of a blessed run: every case on this device has the digest that the committed baseline recorded.

Baselines of every device class are checked, so a machine without a GPU checks a GPU's bits on the host device.
"""

from __future__ import annotations

import pytest
from mxharness import baseline, paths
from mxharness.judge import digest, gates


def pytest_generate_tests(metafunc):
    newest = {entry.device_class: entry for entry in sorted(baseline.list_baselines(paths.baselines()), key=created)}
    metafunc.parametrize("blessed", list(newest.values()) or [None], ids=label)


def label(entry):
    return f"@{entry.device_class}/{entry.name}@" if entry else "@none@"  # no part of the manifest


def created(entry):
    return entry.created


@pytest.fixture
def digests(blessed, device):
    """The digest of every check that the newest baseline of a device class holds."""
    if blessed is None:
        pytest.skip(
            "no baseline came with this version: no bits to compare with; `mxharness baseline create` makes one"
        )
    if device.device_class not in ("host", blessed.device_class):
        pytest.skip(f"{blessed.device_class}/{blessed.name} says nothing about the bits of {device.device_class}")
    return baseline.digests(blessed.device_class, blessed.name, paths.baselines())


def wanted(op, case, digests):
    return {digests[key] for gate in gates(op, case) if (key := baseline.key(str(case), gate)) in digests}


def test_bits_are_those_of_the_baseline(op, blessed, device, outputs, digests):
    held = [case for case in op.cases if wanted(op, case, digests)]
    differ = [case for case in held if wanted(op, case, digests) != {digest(outputs(op, case, op.make_inputs(case)))}]
    name = f"{blessed.device_class}/{blessed.name}"
    assert held, f"{name} holds no case of {op.name}"
    if differ:
        pytest.fail(f"{len(differ)} of {len(held)} cases have other bits than {name}: {differ[0]!r}", pytrace=False)


def test_every_case_is_held_by_the_baseline(op, blessed, digests):
    """But for those that are known to await the next one, which is a skip that says so."""
    name = f"{blessed.device_class}/{blessed.name}"
    new = [case for case in op.cases if not wanted(op, case, digests)]
    if unknown := [case for case in new if case not in op.awaits]:
        pytest.fail(
            f"{name} holds {len(op.cases) - len(new)} of {len(op.cases)} cases of {op.name}, not {unknown[0]!r}; "
            f"`mxharness baseline create NAME --device cuda` on such a GPU blesses them",
            pytrace=False,
        )
    assert set(op.awaits) <= set(new), f"{name} holds what {op.name} has among those that await a baseline"
    if new:
        pytest.skip(
            f"{name} says nothing about the bits of {len(new)} cases of {op.name}, which await the next baseline"
        )
