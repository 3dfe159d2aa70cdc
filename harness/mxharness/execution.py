"""Run one case on a device inside poisoned, fenced memory, and report everything that is not a number.

Outputs are filled with a poison byte before the launch and lie between canaries; so do inputs, whose bytes are
compared afterwards. What a kernel leaves unwritten is then NaN (floats) or differs between two poisons (bytes), and
what it writes outside, or into its inputs, is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mxharness.device import Device
from mxharness.errors import KernelFailure
from mxharness.op import Case, Op, Tensors

FENCE = 256
"""Bytes of canary on either side of every tensor; a multiple of every alignment a kernel asks for."""
CANARY = 0xFF
"""As a scale byte NaN, as a float NaN, as token ids out of range: reading it shows."""


@dataclass(frozen=True)
class Execution:
    """What one launch left behind."""

    outputs: Mapping[str, torch.Tensor]
    """CPU tensors; empty where the kernel failed."""
    violations: tuple[str, ...]
    """Sentences: writes outside an output, changed inputs, a kernel that did not end."""


@dataclass
class Fenced:
    """A Device whose tensors lie between canaries; outputs start as poison."""

    device: Device
    poison: int = 0xFF
    _regions: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the device's."""
        return self.device.name

    @property
    def device_class(self) -> str:
        """As the device's."""
        return self.device.device_class

    @property
    def arithmetic(self) -> str:
        """As the device's."""
        return self.device.arithmetic

    @property
    def torch_device(self) -> torch.device:
        """As the device's."""
        return self.device.torch_device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of poison bytes between canaries."""
        count = torch.Size(shape).numel() * dtype.itemsize
        whole = self.device.empty((count + 2 * FENCE,), torch.uint8)
        whole.fill_(CANARY)
        inner = whole[FENCE : FENCE + count]
        inner.fill_(self.poison)
        tensor = inner.view(dtype).view(shape)
        self._regions.append((whole, tensor))
        return tensor

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy between canaries."""
        copy = self.empty(tuple(tensor.shape), tensor.dtype)
        copy.copy_(tensor)
        return copy

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """As the device's."""
        self.device.launch(source, kernel, grid, block, *arguments)

    def synchronize(self) -> None:
        """As the device's."""
        self.device.synchronize()

    def violations(self, names: Mapping[int, str]) -> list[str]:
        """Sentences about canaries that changed; `names` maps a tensor's address to what to call it."""
        found = []
        for whole, tensor in self._regions:
            count = tensor.numel() * tensor.element_size()
            name = names.get(tensor.data_ptr(), "a workspace")
            for side, fence in (("before the start", whole[:FENCE]), ("past the end", whole[FENCE + count :])):
                changed = (fence != CANARY).nonzero().flatten().cpu()
                if len(changed):
                    first = int(changed[0]) if side == "past the end" else FENCE - int(changed[-1])
                    found.append(f"wrote {len(changed)} bytes {side} of {name}, the nearest {first} bytes away")
        return found


def execute(op: Op, case: Case, device: Device, inputs: Tensors, *, poison: int = 0xFF) -> Execution:
    """Launch `op` on `inputs` (CPU tensors, left as they are) once."""
    fenced = Fenced(device, poison)
    on_device = {name: fenced.upload(tensor) for name, tensor in inputs.items()}
    try:
        outputs = op.launch(fenced, case, on_device)
        fenced.synchronize()
    except KernelFailure as failure:
        return Execution({}, (str(failure),))
    names = {tensor.data_ptr(): f"input {name}" for name, tensor in on_device.items()}
    names |= {tensor.data_ptr(): f"output {name}" for name, tensor in outputs.items()}
    violations = fenced.violations(names)
    for name, tensor in on_device.items():
        if not torch.equal(as_bytes(tensor.cpu()), as_bytes(inputs[name])):
            violations.append(f"changed its input {name}")
    return Execution({name: tensor.cpu() for name, tensor in outputs.items()}, tuple(violations))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat."""
    return tensor.contiguous().flatten().view(torch.uint8)
