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

BEFORE, AFTER = 4096 + 16, 1 << 16
"""Bytes of canary before and after every tensor: some rows of a tile away is still on the fence. A tensor starts at a
multiple of 16 and of no more, which is all the alignment that a kernel may ask for."""
CANARY = 0xFF
"""As a scale byte and as a float NaN: what is read from the fence and reaches an output shows."""


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
    launches: int = 0
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
        return self._fenced(shape, dtype, BEFORE)

    def upload(self, tensor: torch.Tensor, *, aligned: bool = True) -> torch.Tensor:
        """A copy between canaries; at an odd address where the kernels ask for no alignment."""
        copy = self._fenced(tuple(tensor.shape), tensor.dtype, BEFORE if aligned else BEFORE + 1)
        copy.copy_(tensor)
        return copy

    def _fenced(self, shape: tuple[int, ...], dtype: torch.dtype, before: int) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        whole = self.device.empty((before + count + AFTER,), torch.uint8)
        whole.fill_(CANARY)
        inner = whole[before : before + count]
        inner.fill_(self.poison)
        tensor = inner.view(dtype).view(shape)
        self._regions.append((whole, tensor))
        return tensor

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """As the device's."""
        self.launches += 1
        self.device.launch(source, kernel, grid, block, *arguments)

    def synchronize(self) -> None:
        """As the device's."""
        self.device.synchronize()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory that this device handed out, so that poison and canaries watch it."""
        address = tensor.untyped_storage().data_ptr()
        return any(whole.untyped_storage().data_ptr() == address for whole, _ in self._regions)

    def violations(self, names: Mapping[int, str]) -> list[str]:
        """Sentences about canaries that changed; `names` maps a tensor's address to what to call it."""
        found = []
        for whole, tensor in self._regions:
            start = tensor.data_ptr() - whole.data_ptr()
            end = start + tensor.numel() * tensor.element_size()
            name = names.get(tensor.data_ptr(), "a workspace")
            for side, fence in (("before the start", whole[:start]), ("past the end", whole[end:])):
                changed = (fence != CANARY).nonzero().flatten().cpu()
                if len(changed):
                    nearest = int(changed[0]) if side == "past the end" else start - int(changed[-1])
                    found.append(f"wrote {len(changed)} bytes {side} of {name}, the nearest {nearest} bytes away")
        return found


def execute(op: Op, case: Case, device: Device, inputs: Tensors, *, poison: int = 0xFF) -> Execution:
    """Launch `op` on `inputs` (CPU tensors, left as they are) once."""
    fenced = Fenced(device, poison)
    on_device = {name: fenced.upload(tensor, aligned="scales" not in name) for name, tensor in inputs.items()}
    try:
        outputs = op.launch(fenced, case, on_device)
        fenced.synchronize()
    except KernelFailure as failure:
        return Execution({}, (str(failure),))
    for name, tensor in outputs.items():
        if fenced.launches == 0 or not fenced.owns(tensor):
            raise AssertionError(f"{op.name} {case}: output {name} was not made by a kernel on the device's memory")
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
