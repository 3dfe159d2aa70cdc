"""Every operator under a tool that watches each memory access: our checker on the host, compute-sanitizer on a GPU.

On a GPU the operators run in a process of their own, on plain tensors: each has its own cudaMalloc, since torch's
caching allocator hides from the tool where one ends, and there are neither canaries nor poison around them, which the
tool would take for memory that may be touched and has been written.

A tool that sees nothing proves nothing: of each, a planted error must be seen first, and a tool that saw no kernel of
an operator fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.device import cuda, open_device
from mxharness.device.host import CHECKS, HostDevice
from mxharness.device.source import Sources, shipped
from mxharness.device.toolchain import TOOLKIT, nvcc
from mxharness.errors import Unavailable, UserError
from mxharness.execution import execute
from mxharness.faults.launched import launched
from mxharness.ops import OPS, cheapest, find

if TYPE_CHECKING:
    import torch

    from mxharness.device import Device
    from mxharness.op import Case, Op

TOOLS = tuple(CHECKS)
ON_GPU = tuple(tool for tool in TOOLS if tool != "undefined")
"""NVIDIA's tools; the host's compiler is the one that knows what is undefined."""
CASES = 8
"""Of an operator, the cheapest, unless told otherwise; and one for every file of kernels that these do not meet."""
_SECONDS = 3600
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) \w+\b(?! w)")  # not what was left unprinted
_STORE = "    scales[block] = static_cast<std::uint8_t>(s);\n"
_CONTROLS = {
    "memcheck": ("quantize", "quantize.cu", _STORE, _STORE + "    codes[1LL << 40] = 1;\n"),
    "racecheck": ("rms_norm", "warp.cuh", "    __syncthreads();\n    value = scratch[0];", "    value = scratch[0];"),
    "initcheck": (
        "quantize",
        "quantize.cu",
        _STORE,
        _STORE.replace("(s)", "(s + reinterpret_cast<volatile std::uint8_t*>(scales)[block] % 1)"),
    ),
    "undefined": ("quantize", "quantize.cu", _STORE, _STORE.replace("(s)", "(s + (1 << (K + 32)) % 1)")),
}
"""Of each tool an operator and a change of its kernel that the tool must see."""


@dataclass(frozen=True)
class Sanitized:
    """What one tool saw of one operator."""

    tool: str
    op: str
    device: str
    cases: int
    kernels: int
    """Launches."""
    errors: int
    messages: tuple[str, ...]
    """The tool's own words, the first few."""

    @property
    def passed(self) -> bool:
        """Whether there was something to see, and nothing wrong."""
        return self.kernels > 0 and self.errors == 0


def run_sanitize(
    device_name: str = "auto",
    tools: Sequence[str] | None = None,
    ops: Sequence[Op] | None = None,
    *,
    cases: int | None = CASES,
) -> list[Sanitized]:
    """Run each tool (default: all that the device has) over the operators' cheapest cases.

    UserError for a tool that does not exist, or not on this device; and where a tool overlooks its planted error.
    Unavailable without compute-sanitizer.
    """
    device = open_device(device_name)
    known = TOOLS if isinstance(device, HostDevice) else ON_GPU
    for tool in tools or ():
        if tool not in known:
            raise UserError(f"no tool '{tool}' on the {device.name} device; there are {', '.join(known)}")
    rows = []
    for tool in tools or known:
        control(tool, device)
        if isinstance(device, HostDevice):
            rows += [on_host(tool, op, chosen(op, cases, device.name), device) for op in ops or OPS]
        else:
            rows += _on_gpu(tool, device, ops or OPS, cases)
    return rows


def chosen(op: Op, count: int | None, device_name: str) -> list[Case]:
    """The `count` cheapest cases, all for None, and of every further file of kernels the cheapest that launches it.

    Cheap cases take the kernels for few rows.
    """
    found = list(cheapest(op, count))
    met = {source for case in found for source in launched(op.name, case, device_name)}
    for case in cheapest(op)[len(found) :]:
        if not launched(op.name, case, device_name) <= met:
            found.append(case)
            met |= launched(op.name, case, device_name)
    return found


def control(tool: str, device: Device) -> None:
    """UserError where the tool does not see the error planted for it."""
    name, source, old, new = _CONTROLS[tool]
    op = find(name)
    if isinstance(device, HostDevice):
        broken = HostDevice(shipped().replaced(source, old, new), fast=False)
        errors = on_host(tool, op, cheapest(op, 1), broken).errors
    else:
        errors = _visited(tool, [op], 1, planted=True).errors
    if errors == 0:
        raise UserError(f"{tool} on the {device.name} device did not see an error planted for it in kernels/{source}")


def on_host(tool: str, op: Op, cases: Sequence[Case], device: HostDevice) -> Sanitized:
    """One operator under one check of the host's own."""
    checked = device.configured(checks=frozenset([tool]))
    before = checked.checked_launches
    messages = [
        f"{case}: {violation}"
        for case in cases
        for violation in execute(op, case, checked, op.make_inputs(case)).violations
    ]
    seen = checked.checked_launches - before
    return Sanitized(tool, op.name, device.device_class, len(cases), seen, len(messages), tuple(messages[:3]))


# ------------------------------------------------------------------------------------------------- compute-sanitizer


@dataclass(frozen=True)
class _Visit:
    errors: int
    launches: dict[str, int]
    """By operator."""
    lines: tuple[str, ...]


def _on_gpu(tool: str, device: Device, ops: Sequence[Op], cases: int | None) -> list[Sanitized]:
    """One process for all operators; where something is wrong, one for each, to tell which."""
    together = _visited(tool, ops, cases)
    rows = []
    for op in ops:
        visit = _visited(tool, [op], cases) if together.errors and len(ops) > 1 else together
        count = len(chosen(op, cases, device.name))
        seen = visit.launches.get(op.name, 0)
        rows.append(Sanitized(tool, op.name, device.device_class, count, seen, visit.errors, visit.lines))
    if together.errors and not any(row.errors for row in rows):  # seen in company only: no operator is above suspicion
        rows.append(Sanitized(tool, "all together", device.device_class, 0, 1, together.errors, together.lines))
    return rows


def compute_sanitizer() -> str:
    """Path of NVIDIA's tool. Unavailable where it is not."""
    compiler = nvcc()
    folders = [*([str(Path(compiler).parent)] if compiler else []), str(TOOLKIT / "bin")]
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise Unavailable("compute-sanitizer is not installed; it is part of the CUDA toolkit, in its bin folder")
    return found


def _visited(tool: str, ops: Sequence[Op], cases: int | None, *, planted: bool = False) -> _Visit:
    order = json.dumps({"ops": [op.name for op in ops], "cases": cases, "plant": tool if planted else None})
    command = [
        compute_sanitizer(), "--tool", tool, "--print-limit", "10",
        sys.executable, "-c", "from mxharness.sanitize import visit; visit()", order,
    ]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"compute-sanitizer --tool {tool} did not end within {_SECONDS} s") from error
    return parse(tool, done.stdout + done.stderr, planted=planted)


def parse(tool: str, text: str, *, planted: bool = False) -> _Visit:
    """What compute-sanitizer and the process under it printed. UserError where either did not come to its end."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    summary = next((match for line in reversed(lines) if (match := _SUMMARY.search(line))), None)
    if summary is None:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing printed")
        raise UserError(f"compute-sanitizer --tool {tool} gave no summary: {last.strip()}")
    launches = next((line for line in reversed(text.splitlines()) if line.startswith('{"launches"')), None)
    errors = int(summary[1])
    if launches is None and not planted and errors == 0:
        raise UserError(f"the process under compute-sanitizer --tool {tool} ended before all operators had run")
    told = tuple(line for line in lines if line and not line.startswith("COMPUTE-SANITIZER"))[:3] if errors else ()
    return _Visit(errors, json.loads(launches)["launches"] if launches else {}, told)


@dataclass
class _Counted:
    """A Device that counts its launches."""

    device: Device
    launches: int = 0
    name: str = field(init=False)
    device_class: str = field(init=False)
    arithmetic: str = field(init=False)
    sources: Sources = field(init=False)
    torch_device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.device_class = self.device.name, self.device.device_class
        self.arithmetic, self.torch_device = self.device.arithmetic, self.device.torch_device
        self.sources = self.device.sources
        self.empty, self.upload, self.synchronize = self.device.empty, self.device.upload, self.device.synchronize

    def launch(self, *arguments: Any) -> None:  # noqa: ANN401  whatever the device takes
        self.launches += 1
        self.device.launch(*arguments)


def visit(order: dict[str, Any] | None = None) -> None:
    """The process under compute-sanitizer: run the cases and print how many kernels each operator launched."""
    order = order or json.loads(sys.argv[1])
    sources: Sources | None = None
    if order["plant"]:
        _, source, old, new = _CONTROLS[order["plant"]]
        sources = shipped().replaced(source, old, new)
    device = cuda.open_device(sources, optimised=True)  # a planted error as well: compiled as what it stands for
    launches = {}
    for name in order["ops"]:
        op, counted = find(name), _Counted(device)
        for case in chosen(op, order["cases"], device.name):
            op.launch(counted, case, {key: device.upload(tensor) for key, tensor in op.make_inputs(case).items()})
            device.synchronize()
        launches[name] = counted.launches
    print(json.dumps({"launches": launches}), flush=True)
