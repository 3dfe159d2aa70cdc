"""Which files of kernels an operator's case launches from, without running any."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mxharness.device import Device, open_device
from mxharness.errors import UserError
from mxharness.op import Case
from mxharness.ops import find


@cache
def launched(op_name: str, case: Case, device_name: str) -> frozenset[str]:
    """The .cu files, as far as the operator goes with results that are all zeros; its own one among them."""
    op, recorder = find(op_name), Recorder(open_device(device_name), {find(op_name).source})
    inputs = {name: recorder.upload(tensor) for name, tensor in op.make_inputs(case).items()}
    with contextlib.suppress(UserError, RuntimeError, IndexError, ValueError):  # zeros that a next stage does not take
        op.launch(recorder, case, inputs)
    return frozenset(recorder.launched)


@dataclass
class Recorder:
    """A device that runs nothing and notes which files are launched from."""

    device: Device
    launched: set[str]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the device has
        """As the device's."""
        return getattr(self.device, name)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros, which are valid ids, offsets and positions."""
        return self.device.empty(shape, dtype).zero_()

    def launch(self, source: str, *_: object) -> None:
        """Note the file."""
        self.launched.add(source)

    def synchronize(self) -> None:
        """Nothing runs."""
