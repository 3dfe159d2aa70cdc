"""Memory and order: no kernel touches what it may not, reads what nothing wrote, or leans on the order of threads."""

from __future__ import annotations

import pytest
import torch
from mxharness import paths
from mxharness.device import open_device
from mxharness.device.guard import PLACEMENTS
from mxharness.device.host import CHECKS, HostDevice
from mxharness.execution import execute
from mxharness.faults.launched import launched
from mxharness.judge import digest
from mxharness.ops import OPS, cheapest, costs
from mxharness.sanitize import TOOLS, control

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def host() -> HostDevice:
    """Its kernels are the GPU's own text, so all of this is about them, whatever device the run is on."""
    device = open_device("host")
    assert isinstance(device, HostDevice)
    return device


@pytest.fixture(scope="module")
def spread():
    """Some of the cheaper half of an operator's cases; all of them are `mxharness sanitize --cases 0`."""

    def of(op, count):
        cheaper = cheapest(op, -(-len(op.cases) // 2))
        return cheaper[:: -(-len(cheaper) // count)]

    return of


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nothing_is_touched_beside_a_tensor(op, placement, host, spread):
    """Every execution of a run is watched at the end of its tensors; here both ends are, whatever the device."""
    for case in spread(op, 8):
        execution = execute(op, case, host, op.make_inputs(case), placement=placement)
        assert execution.violations == (), f"{case!r}: {'; '.join(execution.violations)}"


def test_no_bit_depends_on_the_order_of_threads(op, host, spread):
    for case in spread(op, 6):
        inputs = op.make_inputs(case)
        right = digest(execute(op, case, host, inputs).outputs)
        for seed in SEEDS:
            execution = execute(op, case, host.configured(seed=seed), inputs)
            assert execution.violations == (), f"{case!r}: {'; '.join(execution.violations)}"
            assert digest(execution.outputs) == right, f"{case!r}: other bits with order {seed}"


def test_every_access_is_in_order(op, host, spread):
    """All checks at once; the same bits as without them shows that no local is read before it is written."""
    checked = host.configured(checks=frozenset(CHECKS))
    for case in spread(op, 4):
        inputs = op.make_inputs(case)
        before = checked.checked_launches
        execution = execute(op, case, checked, inputs)
        assert execution.violations == (), f"{case!r}: {'; '.join(execution.violations)}"
        assert checked.checked_launches > before, f"{case!r}: the checker saw no kernel"
        assert digest(execution.outputs) == digest(execute(op, case, host, inputs).outputs), repr(case)


@pytest.mark.parametrize("source", sorted(path.name for path in paths.kernels().glob("*.cu")))
def test_every_file_of_kernels_is_met_by_all_checks(source, host):
    """Cheap cases take the kernels for few rows; here each file has the cheapest case that launches from it."""
    every = [(costs(op)[case], i, case) for i, op in enumerate(OPS) for case in op.cases]
    met = [(cost, i, case) for cost, i, case in every if source in launched(OPS[i].name, case, "host")]
    assert met, f"no case of any operator launches from {source}"
    _, i, case = min(met, key=lambda found: found[:2])
    execution = execute(OPS[i], case, host.configured(checks=frozenset(CHECKS)), OPS[i].make_inputs(case))
    assert execution.violations == (), f"{case!r}: {'; '.join(execution.violations)}"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_sees_the_error_planted_for_it(tool, host):
    control(tool, host)


def test_a_callers_flush_to_zero_changes_no_bit(op, host, spread):
    assert torch.set_flush_denormal(True), "this processor cannot flush to zero: nothing was tried"
    torch.set_flush_denormal(False)
    for case in spread(op, 4):
        inputs = op.make_inputs(case)
        right = digest(execute(op, case, host, inputs).outputs)
        torch.set_flush_denormal(True)
        try:
            outputs = execute(op, case, host, inputs).outputs
        finally:
            torch.set_flush_denormal(False)
        assert digest(outputs) == right, f"{case!r}: other bits where the caller flushes to zero"
