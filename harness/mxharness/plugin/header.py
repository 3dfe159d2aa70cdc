"""What stands above a run: where kernels run, which ones, what is compared and what must be executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxharness import facts, manifest
from mxharness.device.source import shipped
from mxharness.environment import unit
from mxharness.errors import UserError
from mxharness.plugin import against, known, options
from mxharness.plugin.options import device_of
from mxharness.wording import counted

_DIGITS = 12


def lines(config: pytest.Config, gpus: list[str]) -> list[str]:
    """Three lines, and one about gates that cannot judge this device. gpus: those that workers share."""
    device = device_of(config)
    shared = f", workers share GPUs {', '.join(gpus)}" if len(gpus) > 1 else ""
    exact = ", bit for bit" if device.arithmetic == "tensor-core" else ""
    kernels = f"kernels {shipped().digest()[:_DIGITS]} ({counted(len(shipped().files), 'file')})"
    found = [
        f"{device.device_class} ({unit(device)}), {device.arithmetic} arithmetic{exact}{shared}; {kernels}",
        against.header(config),
        "; ".join(filter(None, (_demanded(config), _ledger(config)))),
        facts.lacking(device.device_class),
    ]
    return [f"mxharness: {line}" for line in found if line]


def _demanded(config: pytest.Config) -> str:
    """What the manifest asks for; nothing where no project's suites are run."""
    if not options.places(config):
        return ""
    try:
        committed = manifest.load(config.rootpath)
    except UserError as error:
        return str(error)
    return f"manifest {committed.digest}, {counted(len(committed.ids), 'test')}"


def _ledger(config: pytest.Config) -> str:
    listed = len(known.of(config).entries)
    named = config.getoption("--known-failures")
    where = f" in {Path(named).name}" if named else ""
    return f"{counted(listed, 'known failure')} listed{where}" if listed else "no known failure"
