"""What there is to test, as `list` and `info` tell it, kept in the cache: to gather it takes torch and all operators.

It is kept under the texts of the package, so that an edit of any of them is seen.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mxharness import __version__
from mxharness.device.presence import torch_build
from mxharness.device.source import compiled
from mxharness.errors import UserError

DISPATCH = {"Hopper and the host device": "sm_90", "other GPUs": "sm_80"}
"""A device class for each kind whose kernels of attention are told."""
DEVICES = {"Hopper": "sm_90", "the host device": "host", "other GPUs": "sm_80"}
"""The same for those of a GEMM."""


def catalogue() -> dict[str, Any]:
    """Operators, input regimes, weight layouts, and the kernels of a GEMM and of attention by kind of device.

    ModuleNotFoundError where torch is missing.
    """
    torch_build()  # what is kept must not hide that nothing can be run
    try:
        key = (__version__, digest(Path(__file__).parent))
        kept = compiled("catalogue", ".json", key, lambda path: _keep(path, gathered()))
    except UserError:  # a cache that cannot be written
        return gathered()
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def gathered() -> dict[str, Any]:
    """The same from the operators themselves."""
    from mxharness.functional import attention_schedule, dispatch
    from mxharness.judge import gates
    from mxharness.mxfp4 import LAYOUTS
    from mxharness.ops import OPS

    operators = [
        {
            "name": op.name,
            "cases": len(op.cases),
            "axes": op.axes,
            "source": op.source,
            "gates": list(dict.fromkeys(gate for case in op.cases for gate in gates(op, case))),
        }
        for op in OPS
    ]
    return {
        "operators": operators,
        "regimes": sorted({case.regime for op in OPS for case in op.cases}),
        "layouts": list(LAYOUTS),
        "dispatch": {title: [list(row) for row in dispatch.table(name)] for title, name in DEVICES.items()},
        "attention": {title: [list(row) for row in attention_schedule.table(name)] for title, name in DISPATCH.items()},
    }


def digest(root: Path) -> str:
    """Of every Python text below a folder."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _keep(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found), encoding="utf-8")
