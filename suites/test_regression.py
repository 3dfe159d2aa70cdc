"""The bits of a blessed run: every case on this device has the digest that the committed baseline recorded.

Baselines of every device class are checked, so a machine without a GPU checks a GPU's bits on the host device.
"""

from __future__ import annotations

import pytest

from mxharness import baseline
from mxharness.execution import execute
from mxharness.judge import digest, gates


def pytest_generate_tests(metafunc):
    blessed = baseline.list_baselines()
    metafunc.parametrize("blessed", blessed, ids=lambda entry: f"{entry.device_class}/{entry.name}")


def test_bits_are_those_of_the_baseline(op, blessed, device):
    digests = baseline.digests(blessed.device_class, blessed.name)
    compared, differ = 0, []
    for case in op.cases:
        want = {digests[key] for gate in gates(op, case) if (key := baseline.key(str(case), gate)) in digests}
        if not want:
            continue
        compared += 1
        if want != {digest(execute(op, case, device, op.make_inputs(case)).outputs)}:
            differ.append(case)
    assert not differ, f"{len(differ)} of {compared} cases have other bits than {blessed}: {differ[0]!r}"
    assert compared == len(op.cases), f"{blessed} holds {compared} of {len(op.cases)} cases; bless the new ones"
