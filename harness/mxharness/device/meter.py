"""A device that counts the bytes it gives out, what activations occupy now and at most, and the kernels it runs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mxharness.device import Device


class Meter:
    """Another device, the bytes of what it allocated and uploaded that some tensor still holds, and its launches."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.name = device.name
        self.device_class = device.device_class
        self.arithmetic = device.arithmetic
        self.sources = device.sources
        self.torch_device = device.torch_device
        self.held = 0
        """Bytes now."""
        self.peak = 0
        """Bytes at most, so far."""
        self.launches = 0
        """Kernels, so far."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As the device's, counted."""
        return self._counted(self._device.empty(shape, dtype))

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the device's, counted."""
        return self._counted(self._device.upload(tensor))

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """As the device's, counted."""
        self.launches += 1
        self._device.launch(source, kernel, grid, block, *arguments)

    def synchronize(self) -> None:
        """As the device's."""
        self._device.synchronize()

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # lives as long as any view of it
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, storage.nbytes()).atexit = False
        return tensor

    def _release(self, count: int) -> None:
        self.held -= count
