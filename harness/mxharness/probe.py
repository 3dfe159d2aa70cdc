"""Does this device's matrix instruction follow the model of docs/tensor_core.md? Any user can ask their own GPU.

The operator `mma` is run on random, wide-range, positive, subnormal and overflowing data and compared bit for bit with
tensor_core.mma. Neighbouring models (other step lengths, other fraction bits) must mismatch on the same data, or the
data could not have told them apart and the probe proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mxharness import tensor_core
from mxharness.device import open_device
from mxharness.errors import KernelFailure
from mxharness.execution import execute
from mxharness.ops import mma
from mxharness.tensor_core import HOPPER, Unit

NEIGHBOURS = (Unit(4, 25), Unit(8, 25), Unit(16, 23), Unit(16, 24), Unit(16, 26), Unit(16, 27))


@dataclass(frozen=True)
class ProbeRow:
    """One dtype and distribution."""

    dtype: str
    regime: str
    elements: int
    mismatches: int
    """Elements whose bits differ from the model's."""


@dataclass(frozen=True)
class ProbeResult:
    """What the device computes."""

    passed: bool
    device_class: str
    message: str
    rows: tuple[ProbeRow, ...]
    neighbours: dict[str, float]
    """Share of elements that each neighbouring model gets wrong, by "step x fraction bits"."""


def run_probe(device_name: str = "auto", seeds: int = 64) -> ProbeResult:
    """Compare `seeds` random draws of every mma case up to K = 128, plus the long chains once.

    Raises KernelFailure where the kernel does not end or writes where it must not.
    """
    device = open_device(device_name)
    rows: dict[tuple[str, str], ProbeRow] = {}
    wrong, compared = dict.fromkeys(NEIGHBOURS, 0), 0
    for seed in range(seeds):
        for case in mma.CASES:
            if seed > 0 and case.shape[1] > 128:
                continue
            drawn = replace(case, seed=seed)
            inputs = mma.make_inputs(drawn)
            execution = execute(mma.OP, drawn, device, inputs)
            if execution.violations:
                raise KernelFailure("; ".join(execution.violations))
            got = execution.outputs["d"].double().numpy()
            c, a, b = (inputs[name].double().numpy() for name in ("c", "a", "b"))
            key = (case.dtype, case.regime)
            row = rows.setdefault(key, ProbeRow(*key, 0, 0))
            differ = _differ(got, tensor_core.mma(c, a, b, case.dtype, HOPPER))
            rows[key] = replace(row, elements=row.elements + got.size, mismatches=row.mismatches + differ)
            if seed == 0:
                compared += got.size
                for unit in NEIGHBOURS:
                    wrong[unit] += _differ(got, tensor_core.mma(c, a, b, case.dtype, unit))
    total = sum(row.elements for row in rows.values())
    mismatches = sum(row.mismatches for row in rows.values())
    shares = {f"{unit.step} x {unit.fraction_bits}": wrong[unit] / compared for unit in NEIGHBOURS}
    blind = [name for name, share in shares.items() if share == 0]
    passed = mismatches == 0 and not blind
    message = (
        f"{'PASS' if passed else 'FAIL'}: {mismatches} of {total} results on {device.device_class} differ from the "
        f"model (steps of 16, 25 fraction bits, truncation); neighbouring models differ in "
        f"{min(shares.values()):.2%} to {max(shares.values()):.2%}"
    )
    if blind:
        message += f"; the data cannot tell the model from {', '.join(blind)}, so this probe proves nothing"
    return ProbeResult(passed, device.device_class, message, tuple(rows.values()), shares)


def _differ(got: tensor_core.Floats, want: tensor_core.Floats) -> int:
    """Elements whose bits differ; every NaN is the same NaN, the two zeros are not."""
    same = (got == want) & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want))
    return int((~same).sum())
