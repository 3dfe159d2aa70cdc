"""A device that shows every launch: what a kernel was given by the names of its parameters, and what it left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mxharness.device.argument import TensorMap
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.op import Tensors

Given = Mapping[str, "torch.Tensor | float | None"]
"""A launch's arguments by its kernel's parameters: CPU tensors as they were before it, numbers, None."""


@dataclass(frozen=True)
class Launch:
    """One kernel of a model's run."""

    kernel: str
    given: Given
    left: Tensors
    """The tensors among the arguments as they were after it."""

    def tensor(self, name: str) -> torch.Tensor:
        """An argument that must be a tensor."""
        found = self.given[name]
        if not isinstance(found, torch.Tensor):
            raise UserError(f"{self.kernel} was launched without {name}")
        return found

    def tensors(self, *names: str) -> dict[str, torch.Tensor]:
        """Those of the arguments that are tensors and not None."""
        return {name: found for name in names if isinstance(found := self.given.get(name), torch.Tensor)}

    def number(self, name: str) -> float:
        """An argument that must be a number."""
        found = self.given[name]
        if found is None or isinstance(found, torch.Tensor):
            raise UserError(f"{self.kernel} was launched without a number {name}")
        return float(found)


@dataclass
class Watched:
    """A Device that shows every launch to `see`, with its tensors as they were before and after."""

    device: Device
    see: Callable[[Launch, Mapping[str, int]], None]
    """Of the launch and the addresses of its tensors, by their parameters."""

    def __post_init__(self) -> None:
        self.name = self.device.name
        self.device_class = self.device.device_class
        self.arithmetic = self.device.arithmetic
        self.sources = self.device.sources
        self.torch_device = self.device.torch_device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As the device's."""
        return self.device.empty(shape, dtype)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the device's."""
        return self.device.upload(tensor)

    def synchronize(self) -> None:
        """As the device's."""
        self.device.synchronize()

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """As the device's, and waits for it."""
        named = dict(zip(self.sources.parameters(source, kernel), arguments, strict=True))
        given = {name: _copied(a) for name, a in named.items()}
        self.device.launch(source, kernel, grid, block, *arguments)
        self.device.synchronize()
        tensors = {name: a for name, a in named.items() if isinstance(a, torch.Tensor)}
        left = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.see(Launch(kernel, given, left), {name: tensor.data_ptr() for name, tensor in tensors.items()})


def _copied(argument: object) -> torch.Tensor | float | None:
    """What a kernel was given: a tensor's copy on the CPU, a number, None. Of a map None: its tensor is given, too."""
    if isinstance(argument, torch.Tensor):
        return argument.to("cpu", copy=True)
    if argument is None or isinstance(argument, TensorMap):
        return None
    return float(argument)  # type: ignore[arg-type]  # a number: there is nothing else
