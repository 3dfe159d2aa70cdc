"""Where kernels run: a CUDA GPU (cuda.py, PyCUDA) or the CPU (host.py, the same .cu through g++).

Both offer the small surface of `Device`; operators and models see nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch

    from mxharness.device.source import Sources


class Device(Protocol):
    """The surface operators, judge and models use."""

    @property
    def name(self) -> str:
        """Either "host" or "cuda"."""

    @property
    def device_class(self) -> str:
        """Key of a baseline: "host", or "sm_90" for compute capability 9.0."""

    @property
    def arithmetic(self) -> str:
        """Either "tensor-core" (bit for bit) or "float32" (the host's fast mode, other bits)."""

    @property
    def sources(self) -> Sources:
        """The texts its kernels are compiled from."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors handed to `launch` must live."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor on this device."""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `tensor` on this device."""

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """Run `kernel` of kernels/`source`. Asynchronous on a GPU: `synchronize` before reading results."""

    def synchronize(self) -> None:
        """Wait until everything launched has finished; raises what a kernel failed with."""


def open_device(name: str = "auto", *, fast: bool = False, sources: Sources | None = None) -> Device:
    """The device called `name`: "host", "cuda", or "auto" (cuda where a GPU, pycuda and nvcc are present, else host).

    fast: the host device's float32 mode, for long model runs; other bits than a tensor core's.
    sources: kernel texts to compile instead of the ones in kernels/ (planted faults).

    Raises UserError for another name, and Unavailable, with what to install, where the device cannot be
    had. "cuda" never falls back to the host.
    """
    from mxharness.device import cuda, host

    if name == "auto":
        name = "host" if cuda.missing() else "cuda"
    if name == "cuda":
        if fast:
            raise UserError("the float32 mode exists on the host device only; leave out --fast or take --device host")
        return cuda.open_device(sources)
    if name == "host":
        return host.open_device(sources, fast=fast)
    raise UserError(f"no device '{name}'; there are host, cuda and auto")
