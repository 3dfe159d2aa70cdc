"""The bits of a blessed run: every case on this device has the digest that the committed baseline recorded.

Baselines of every device class are checked, so a machine without a GPU checks a GPU's bits on the host device.
"""

from __future__ import annotations

import pytest
from mxharness import baseline, paths
from mxharness.judge import digest, gates
from mxharness.op import GATES


def pytest_generate_tests(metafunc):
    newest = {entry.device_class: entry for entry in sorted(baseline.list_baselines(paths.baselines()), key=created)}
    metafunc.parametrize("blessed", list(newest.values()) or [None], ids=label)


def label(entry):
    return f"@{entry.device_class}/{entry.name}@" if entry else "@none@"  # no part of the manifest


def created(entry):
    return entry.created


def test_bits_are_those_of_the_baseline(op, blessed, device, outputs):
    if blessed is None:
        pytest.skip(
            "no baseline came with this version: no bits to compare with; `mxharness baseline create` makes one"
        )
    if device.device_class not in ("host", blessed.device_class):
        pytest.skip(f"{blessed.device_class}/{blessed.name} says nothing about the bits of {device.device_class}")
    digests = baseline.digests(blessed.device_class, blessed.name, paths.baselines())
    compared, differ = 0, []
    for case in op.cases:
        want = {digests[key] for gate in gates(op, case) if (key := baseline.key(str(case), gate)) in digests}
        if not want:
            continue
        compared += 1
        if want != {digest(outputs(op, case, op.make_inputs(case)))}:
            differ.append(case)
    name = f"{blessed.device_class}/{blessed.name}"
    if differ:
        pytest.fail(f"{len(differ)} of {compared} cases have other bits than {name}: {differ[0]!r}", pytrace=False)
    if compared < len(op.cases):
        new = next(case for case in op.cases if not any(baseline.key(str(case), gate) in digests for gate in GATES))
        pytest.fail(
            f"{name} holds {compared} of {len(op.cases)} cases of {op.name}, not {new!r}; "
            f"`mxharness baseline create NAME --device cuda` on such a GPU blesses them",
            pytrace=False,
        )
