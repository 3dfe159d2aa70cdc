"""Executions in another process, for a process whose GPU context was lost to a broken kernel.

An illegal access ends a CUDA context, and with it every later launch of the process. So that one broken kernel is one
failed check, executions go through a child from then on; a child that fails is thrown away.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mxharness.device import Device, open_device
from mxharness.sandbox import Lost, Sandbox

if TYPE_CHECKING:
    from mxharness.device.guard import Placement
    from mxharness.device.source import Sources
    from mxharness.execution import Execution
    from mxharness.op import Case, Op, Tensors


def execute_elsewhere(
    op: Op, case: Case, device_name: str, sources: Sources, inputs: Tensors, poison: int, placement: Placement
) -> Execution:
    """As `execution.execute`, in the child."""
    from mxharness.execution import Execution

    try:
        execution = _child().call(_execute, op.name, case, device_name, sources, dict(inputs), poison, placement)
    except Lost as lost:
        return Execution({}, (str(lost),), hung=lost.hung)
    if not execution.outputs:
        _child().close()
    return execution


@cache
def _child() -> Sandbox:
    return Sandbox()


@cache
def _device(name: str, sources: Sources) -> Device:
    return open_device(name, sources=sources)


def _execute(
    op_name: str, case: Case, device_name: str, sources: Sources, inputs: Tensors, poison: int, placement: Placement
) -> Execution:
    from mxharness.execution import execute
    from mxharness.ops import find

    return execute(find(op_name), case, _device(device_name, sources), inputs, poison=poison, placement=placement)
