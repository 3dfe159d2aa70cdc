"""Run one case on a device inside poisoned, fenced memory, and report everything that is not a number.

Outputs are filled with a poison byte before the launch and lie between canaries; so do inputs, whose bytes are
compared afterwards. What a kernel leaves unwritten is then NaN (floats) or differs between two poisons (bytes), and
what it writes outside, or into its inputs, is named. On the host device pages that nobody may touch lie on both sides
of every tensor besides, also of those that the device did not hand out, and shared memory starts as poison.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mxharness.device import Device
from mxharness.device.argument import TensorMap
from mxharness.device.cuda import CudaDevice
from mxharness.device.guard import GUARD, Placement, allocate
from mxharness.device.host import HostDevice
from mxharness.elsewhere import execute_elsewhere
from mxharness.errors import Hung, KernelFailure, OutOfBounds
from mxharness.op import Case, Op, Tensors

BEFORE, AFTER = 4096 + 16, 1 << 16
"""Bytes of canary before and after every tensor on a GPU: some rows of a tile away is still on the fence. A tensor
starts at a multiple of 16 and of no more, which is all the alignment that a kernel may ask for."""
CANARY = 0xFF
"""As a scale byte and as a float NaN: what is read from the fence and reaches an output shows."""
_OWN = (0xEE, 0xDD, 0xCC, 0xBB)
"""Bytes at even addresses of the fences of what kernels write: NaN still, but of other bits than beside the next one.
Arithmetic hands a NaN on as it is, so that a NaN from one fence written to another like it would not show."""


@dataclass(frozen=True)
class Execution:
    """What one launch left behind."""

    outputs: Mapping[str, torch.Tensor]
    """CPU tensors; empty where the kernel failed."""
    violations: tuple[str, ...]
    """Sentences: writes outside an output, changed inputs, a kernel that did not end."""
    memory: bool = False
    """Whether a violation is about memory: a canary, a guard page, a changed input."""
    hung: bool = False
    """Whether the kernel did not end within its limit."""


@dataclass(frozen=True, eq=False)
class _Region:
    whole: torch.Tensor
    """uint8: the tensor's bytes and the canaries around them."""
    tensor: torch.Tensor
    canary: int
    """At even addresses; CANARY at the others."""

    @property
    def begin(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        return self.begin + self.tensor.numel() * self.tensor.element_size()


@dataclass
class Fenced:
    """A Device whose tensors lie between canaries, on the host between guard pages too; outputs start as poison."""

    device: Device
    poison: int = 0xFF
    placement: Placement = "end"
    """Which end of a tensor the host's guard pages watch to the byte."""
    names: dict[int, str] = field(default_factory=dict)
    """What to call the tensor at an address, in messages."""
    launches: int = 0
    _regions: list[_Region] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.device.name
        self.device_class = self.device.device_class
        self.arithmetic = self.device.arithmetic
        self.sources = self.device.sources
        self.torch_device = self.device.torch_device
        self._host = self.device.configured(poison=self.poison) if isinstance(self.device, HostDevice) else None
        if self._host and self._host.settings.checks:
            weakref.finalize(self, _unwatch, self._host, self._regions)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of poison bytes between canaries."""
        return self._fenced(shape, dtype)

    def upload(self, tensor: torch.Tensor, *, aligned: bool = True) -> torch.Tensor:
        """A copy between canaries; at an odd address where the kernels ask for no alignment."""
        copy = self._fenced(tuple(tensor.shape), tensor.dtype, aligned=aligned, written=True)
        return copy.copy_(tensor, non_blocking=True)  # from memory that may change: CUDA has read it on return

    def _fenced(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, aligned: bool = True, written: bool = False
    ) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        if self._host:
            guarded = allocate(count, self.placement, aligned=aligned)
            whole, start = guarded.whole, guarded.start
        else:
            start = BEFORE if aligned else BEFORE + 1
            whole = self.device.empty((start + count + AFTER,), torch.uint8)
        canary = CANARY if written else _OWN[len(self._regions) % len(_OWN)]
        for begin, end in ((0, start), (start + count, len(whole))):
            for part, byte in _canaries(whole, begin, end, canary):
                part.fill_(byte)
        inner = whole[start : start + count]
        if not written:
            inner.fill_(self.poison)
        tensor = inner.view(dtype).view(shape)
        self._regions.append(_Region(whole, tensor, canary))
        if self._host and self._host.settings.checks:
            self._host.watch(tensor, written=written)
        return tensor

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """As the device's; an access outside on the host device raises OutOfBounds with the tensor's name."""
        self.launches += 1
        if self._host:
            self._launch_on(self._host, source, kernel, grid, block, *arguments)
        else:
            self.device.launch(source, kernel, grid, block, *arguments)

    def _launch_on(
        self,
        host: HostDevice,
        source: str,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *arguments: object,
    ) -> None:
        for region in self._regions if host.settings.checks else ():
            host.note_written(region.tensor, self.poison)
        strangers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and not self.owns(argument):
                strangers[argument.data_ptr()] = (_extent(argument), self._moved(argument))
        moved = [_in_place_of(argument, strangers) for argument in arguments]
        try:
            host.launch(source, kernel, grid, block, *moved)
        except OutOfBounds as failure:
            names = dict(zip(_addresses(moved), host.sources.parameters(source, kernel), strict=False))
            raise failure.at(self._place(failure.address, names)) from None
        for original, copy in strangers.values():
            if not torch.equal(original, copy):
                original.copy_(copy)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fenced copy of a tensor that somebody else made, of all the bytes that it spans."""
        return self.upload(_extent(tensor), aligned=tensor.data_ptr() % 16 == 0)

    def _place(self, address: int, parameters: Mapping[int, str]) -> str:
        """Name a byte: of which tensor, or how far outside the nearest."""

        def distance(region: _Region) -> int:
            return max(region.begin - address, address - region.end + 1, 0)

        region = min(self._regions, key=distance, default=None)
        if region is None or distance(region) > GUARD:
            return f"address {address:#x}, which is near no tensor"
        name = self.names.get(region.begin)
        if name is None:
            inside = (text for start, text in parameters.items() if region.begin <= start < max(region.end, start + 1))
            name = next((text for start, text in parameters.items() if start == region.begin), next(inside, ""))
        name = name or "a workspace"
        if address >= region.end:
            return f"byte {address - region.end + 1} past the end of {name}"
        if address < region.begin:
            return f"byte {region.begin - address} before the start of {name}"
        return f"byte {address - region.begin} of {name}"

    def synchronize(self) -> None:
        """As the device's."""
        self.device.synchronize()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory that this device handed out, so that poison and canaries watch it."""
        address = tensor.untyped_storage().data_ptr()
        return any(region.whole.untyped_storage().data_ptr() == address for region in self._regions)

    def touched(self) -> torch.Tensor:
        """(any,) bool on the device: which parts of the fences have bytes that changed."""
        found = [torch.zeros((), dtype=torch.bool, device=self.torch_device)]
        for region in self._regions:
            start, end = region.begin - region.whole.data_ptr(), region.end - region.whole.data_ptr()
            for fence in ((0, start), (end, len(region.whole))):
                found += [(part != byte).any() for part, byte in _canaries(region.whole, *fence, region.canary)]
        return torch.stack(found)

    def violations(self) -> list[str]:
        """Sentences about canaries that changed."""
        found = []
        for region in self._regions:
            start = region.begin - region.whole.data_ptr()
            end = region.end - region.whole.data_ptr()
            name = self.names.get(region.begin, "a workspace")
            whole = region.whole
            for side, fence in (("before the start", (0, start)), ("past the end", (end, len(whole)))):
                parts = [(part != byte).nonzero().flatten() for part, byte in _canaries(whole, *fence, region.canary)]
                apart = len(parts)
                changed = [place * apart + i for i, part in enumerate(parts) for place in part.tolist()]
                if changed:
                    nearest = min(changed) if side == "past the end" else start - max(changed)
                    found.append(f"wrote {len(changed)} bytes {side} of {name}, the nearest {nearest} bytes away")
        return found


def _canaries(whole: torch.Tensor, begin: int, end: int, even: int) -> list[tuple[torch.Tensor, int]]:
    """The fence whole[begin:end] as every so many bytes that are the same, from its first on, and which they are."""
    if even == CANARY:
        return [(whole[begin:end], CANARY)]
    return [(whole[begin + i : end : 2], CANARY if (begin + i) % 2 else even) for i in range(2)]


def _unwatch(host: HostDevice, regions: list[_Region]) -> None:
    for region in regions:
        host.unwatch(region.tensor)


def _extent(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes that a tensor spans, between its elements too."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((count if tensor.numel() else 0,), (1,)).view(torch.uint8)


def _in_place_of(argument: object, strangers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> object:
    """The copy of a stranger, or its map; any other argument itself."""
    if isinstance(argument, TensorMap) and argument.matrix.data_ptr() in strangers:
        copy = strangers[argument.matrix.data_ptr()][1]
        return replace(argument, matrix=copy.view(argument.matrix.dtype).view(argument.matrix.shape))
    if isinstance(argument, torch.Tensor) and argument.data_ptr() in strangers:
        return strangers[argument.data_ptr()][1]
    return argument


def _addresses(arguments: Iterable[object]) -> list[int]:
    """Of the tensors; for the others, which have none, their negative place."""
    return [a.data_ptr() if isinstance(a, torch.Tensor) else -i - 1 for i, a in enumerate(arguments)]


def execute(
    op: Op, case: Case, device: Device, inputs: Tensors, *, poison: int = 0xFF, placement: Placement = "end"
) -> Execution:
    """Launch `op` on `inputs` (CPU tensors, left as they are) once.

    placement: which end of a tensor lies at a guard page, on the host device. In a process whose GPU context is lost
    this happens in another one.
    """
    if isinstance(device, CudaDevice) and device.dead:
        return execute_elsewhere(op, case, device.name, device.sources, inputs, poison, placement)
    fenced = Fenced(device, poison, placement)
    even = scales_aligned(case)
    on_device = {name: fenced.upload(tensor, aligned=even or "scales" not in name) for name, tensor in inputs.items()}
    fenced.names |= {tensor.data_ptr(): f"input {name}" for name, tensor in on_device.items()}
    on_cpu = fenced.torch_device.type == "cpu"
    before = inputs if on_cpu else {name: tensor.clone() for name, tensor in on_device.items()}
    try:
        outputs = op.launch(fenced, case, on_device)
        fenced.synchronize()
    except KernelFailure as failure:
        return Execution({}, (str(failure),), isinstance(failure, OutOfBounds), isinstance(failure, Hung))
    except torch.AcceleratorError as error:  # torch met a broken kernel's error first
        return Execution({}, (str(device.failed(error) if isinstance(device, CudaDevice) else error),))
    for name, tensor in outputs.items():
        if fenced.launches == 0 or not fenced.owns(tensor):
            raise AssertionError(f"{op.name} {case}: output {name} was not made by a kernel on the device's memory")
    fenced.names |= {tensor.data_ptr(): f"output {name}" for name, tensor in outputs.items()}
    changed = [(as_bytes(tensor) != as_bytes(before[name])).any() for name, tensor in on_device.items()]
    *values, touched, differ = fetched([*outputs.values(), fenced.touched(), torch.stack(changed)])
    violations = fenced.violations() if touched.any() else []
    violations += [f"changed its input {name}" for name, found in zip(on_device, differ.tolist(), strict=True) if found]
    return Execution(dict(zip(outputs, values, strict=True)), tuple(violations), bool(violations))


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the CPU: as they are, or from a GPU in one transfer, each of which waits among processes."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())  # so that each is aligned
    whole = torch.cat([as_bytes(tensors[i]) for i in order]).cpu()
    found, at = dict.fromkeys(order, whole), 0
    for i in order:
        count = tensors[i].numel() * tensors[i].element_size()
        found[i] = whole[at : at + count].view(tensors[i].dtype).view(tensors[i].shape)
        at += count
    return [found[i] for i in range(len(tensors))]


def scales_aligned(case: Case) -> bool:
    """Whether scale bytes lie where several may be read at once: in every second case; elsewhere at an odd address."""
    return zlib.crc32(str(case).encode()) % 2 == 0


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat."""
    return tensor.contiguous().flatten().view(torch.uint8)
