"""Which model does this device's matrix instruction follow, bit for bit? Any user can ask their own GPU.

The operator `mma` is run on random, wide-range, positive, subnormal and overflowing data and compared with
tensor_core.mma: as Hopper's unit first, else as the one that directed inputs find in the family (fitting.py).
Neighbouring units (other steps, other fraction bits, other roundings) must mismatch on the same data, or the data could
not have told them apart and the probe proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from mxharness import facts, fitting, tensor_core
from mxharness.device import Device
from mxharness.errors import KernelFailure
from mxharness.execution import execute
from mxharness.fitting import FAMILY, KNOWN, Vectors, differing
from mxharness.op import Case, Tensors
from mxharness.ops import mma
from mxharness.regimes import DTYPES
from mxharness.tensor_core import HOPPER, STEP, Floats, Unit

DTYPE_NAMES = ("bf16", "fp16")
WIDTHS = range(18, 25)
"""Exponents of the integers that are tried; float32 ends at 24."""
_FEW = 4  # problems of a case on which many models are compared
_SHORT = 128  # the longest chain that is drawn more than once


@dataclass(frozen=True)
class ProbeRow:
    """One dtype and distribution."""

    dtype: str
    regime: str
    elements: int
    mismatches: int
    """Elements whose bits differ from the model's."""


@dataclass(frozen=True)
class Finding:
    """What one dtype's instruction computes."""

    dtype: str
    unit: Unit | None
    """The model it follows; None for none in the family."""
    closest: Unit
    """The same, or the one with the fewest other bits."""
    difference: float
    """Share of results with other bits than the closest model's."""
    neighbours: dict[str, float]
    """Share of results with other bits than a model that differs in one property, by that property."""
    moved_inside: int
    """Results that changed with the order of the products inside a step: none where they are added exactly."""
    moved_across: int
    """Results that changed when steps changed places: none means that the data could not tell."""

    @property
    def known(self) -> str:
        """Whose published model it is; empty where nobody's."""
        return next((known.name for known in KNOWN if known.unit == self.unit), "")

    @property
    def blind(self) -> list[str]:
        """What the data could not have told from the model."""
        unseen = [name for name, share in self.neighbours.items() if share == 0]
        return unseen + ([] if self.moved_across else ["another order of the steps"])

    @property
    def model(self) -> str:
        """The model in words."""
        if self.unit is None:
            return (
                f"no model in the family of {len(FAMILY):,}: the closest, {self.closest}, differs in "
                f"{self.difference:.2%} of the results"
            )
        if self.unit == HOPPER:
            return f"Hopper's model ({self.unit})"
        return f"a fitted model: {self.unit}" + (f" (as published of {self.known})" if self.known else "")


@dataclass(frozen=True)
class ProbeResult:
    """What the device computes."""

    passed: bool
    device_class: str
    message: str
    rows: tuple[ProbeRow, ...]
    findings: tuple[Finding, ...]
    exact_integers: int
    """Sums are exact as long as the sum of the magnitudes of the integers stays within this; 0 where none is."""
    past_exact: float
    """What 2^24 + 15 ones comes out as, less 2^24."""
    unit_roundoff: float
    """With which gamma_n bounds a chain on this device."""


def run_probe(device: Device, seeds: int = 64) -> ProbeResult:
    """Find each dtype's unit, and compare `seeds` random draws of every mma case up to K = 128, the long chains once.

    Raises KernelFailure where the kernel does not end or writes where it must not.
    """
    findings, rows = [], []
    for dtype in DTYPE_NAMES:
        sample = list(_draws(device, dtype, 1))
        few = [_Draw(draw.case, _part(draw.inputs), draw.got[:_FEW]) for draw in sample if draw.case.shape[1] <= _SHORT]
        unit = _unit(device, dtype, few)
        model = unit or _closest(dtype, few)
        found = _rows(_draws(device, dtype, seeds) if unit else sample, dtype, model)
        share = sum(row.mismatches for row in found) / max(1, sum(row.elements for row in found))
        near = {name: _share(few, other) for name, other in fitting.neighbours(model).items()}
        moved = _moved(device, dtype, model.step)
        right = unit if share == 0 and moved[0] == 0 else None
        findings.append(Finding(dtype, right, model, share, near, *moved))
        rows += found
    worst = facts.unmeasured(device.device_class)
    roundoffs = [tensor_core.unit_roundoff(found.unit) if found.unit else worst for found in findings]
    return ProbeResult(
        passed=all(found.unit and not found.blind for found in findings),
        device_class=device.device_class,
        message=_message(device.device_class, findings, rows),
        rows=tuple(rows),
        findings=tuple(findings),
        exact_integers=exact_integers(device),
        past_exact=_past_exact(device),
        unit_roundoff=max(roundoffs),
    )


def as_fact(result: ProbeResult, gpu: str, driver: str) -> facts.DeviceFact:
    """What the judge may assume of this device class from now on."""
    return facts.DeviceFact(
        device_class=result.device_class,
        gpu=gpu,
        driver=driver,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        units={found.dtype: found.unit for found in result.findings},
        exact_integers=result.exact_integers,
        unit_roundoff=result.unit_roundoff,
        results=sum(row.elements for row in result.rows),
        mismatches=sum(row.mismatches for row in result.rows),
        source="mxharness probe",
    )


def _message(device_class: str, findings: list[Finding], rows: list[ProbeRow]) -> str:
    models = {found.dtype: found.model for found in findings}
    total, wrong = sum(row.elements for row in rows), sum(row.mismatches for row in rows)
    one = len(set(models.values())) == 1
    follows = models[DTYPE_NAMES[0]] if one else "; ".join(f"in {name} {model}" for name, model in models.items())
    blind = {name for found in findings for name in found.blind}
    shares = [share for found in findings for share in found.neighbours.values()]
    passed = all(found.unit for found in findings) and not blind
    message = f"{'PASS' if passed else 'FAIL'}: {device_class} follows {follows}; {wrong:,} of {total:,} results differ"
    if blind:
        return (
            f"{message}; the data cannot tell the model from {', '.join(sorted(blind))}, so this probe proves nothing"
        )
    return f"{message}, and from neighbouring models {min(shares):.2%} to {max(shares):.2%}"


@dataclass(frozen=True)
class _Draw:
    case: Case
    inputs: Tensors
    got: Floats


def _draws(device: Device, dtype: str, seeds: int) -> Iterator[_Draw]:
    for seed in range(seeds):
        for case in mma.CASES:
            if case.dtype == dtype and (seed == 0 or case.shape[1] <= _SHORT):
                drawn = replace(case, seed=seed)
                inputs = mma.make_inputs(drawn)
                yield _Draw(drawn, inputs, _run(device, drawn, inputs))


def _run(device: Device, case: Case, inputs: Tensors) -> Floats:
    execution = execute(mma.OP, case, device, inputs)
    if execution.violations:
        raise KernelFailure("; ".join(execution.violations))
    got: Floats = execution.outputs["d"].double().numpy()
    return got


def _part(inputs: Tensors) -> Tensors:
    return {name: tensor[:_FEW] for name, tensor in inputs.items()}


def _wrong(draw: _Draw, unit: Unit) -> int:
    c, a, b = (draw.inputs[name].double().numpy() for name in ("c", "a", "b"))
    return differing(draw.got, tensor_core.mma(c, a, b, draw.case.dtype, unit))


def _share(draws: list[_Draw], unit: Unit) -> float:
    return sum(_wrong(draw, unit) for draw in draws) / max(1, sum(draw.got.size for draw in draws))


def _rows(draws: Iterator[_Draw] | list[_Draw], dtype: str, unit: Unit) -> list[ProbeRow]:
    rows: dict[str, ProbeRow] = {}
    for draw in draws:
        regime = draw.case.regime
        row = rows.setdefault(regime, ProbeRow(dtype, regime, 0, 0))
        wrong = row.mismatches + _wrong(draw, unit)
        rows[regime] = replace(row, elements=row.elements + draw.got.size, mismatches=wrong)
    return list(rows.values())


def _unit(device: Device, dtype: str, few: list[_Draw]) -> Unit | None:
    """Hopper's where nothing contradicts it, else what the directed inputs leave of the family."""
    if _share(few, HOPPER) == 0:
        return HOPPER
    return next(iter(fitting.fit(lambda vectors: sums(device, dtype, vectors), dtype).units), None)


def _closest(dtype: str, few: list[_Draw]) -> Unit:
    """The member of the family with the fewest other bits on ordinary data."""
    ordinary = [draw for draw in few if draw.case.shape[1] == STEP and draw.case.regime in ("normal", "wide")]
    some = [_Draw(d.case, {name: x[:2] for name, x in d.inputs.items()}, d.got[:2]) for d in ordinary]
    return min(FAMILY, key=lambda unit: _share(some, unit))


def sums(device: Device, dtype: str, vectors: Vectors) -> Floats:
    """The sums (V) of directed vectors on the device, each at another place of the instruction's results."""
    V = len(vectors.c)
    at = (torch.arange(V), torch.arange(V) % 16, torch.arange(V) % 8)
    a, b = torch.zeros(V, 16, STEP).double(), torch.zeros(V, 8, STEP).double()
    c = torch.zeros(V, 16, 8)
    a[at[0], at[1]], b[at[0], at[2]] = torch.from_numpy(vectors.a), torch.from_numpy(vectors.b)
    c[at] = torch.from_numpy(vectors.c).float()
    inputs = {"a": a.to(DTYPES[dtype]), "b": b.to(DTYPES[dtype]), "c": c}
    got: Floats = _run(device, Case("mma", (V, STEP), dtype=dtype), inputs)[tuple(index.numpy() for index in at)]
    return got


def _moved(device: Device, dtype: str, step: int) -> tuple[int, int]:
    """Results that change with the order of the products inside each step, and when the steps change places."""
    case = Case("mma", (64, 4 * STEP), regime="wide", dtype=dtype)
    inputs = mma.make_inputs(case)
    before = _run(device, case, inputs)
    K = case.shape[1]
    inside = np.random.default_rng(0).permuted(np.arange(K).reshape(-1, step), axis=1).flatten()
    across = np.roll(np.arange(K), step)

    def moved(order: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> int:
        changed = {name: inputs[name][..., order].contiguous() for name in ("a", "b")}
        return differing(_run(device, case, {**inputs, **changed}), before)

    return moved(inside), moved(across)


def exact_integers(device: Device) -> int:
    """The largest power of two within which every sum of integers came out exact, 0 where none did."""
    exact = 0
    for width in WIDTHS:
        if any(_inexact(device, dtype, width) for dtype in DTYPE_NAMES):
            break
        exact = 2**width
    return exact


def _inexact(device: Device, dtype: str, width: int) -> int:
    """Wrong sums of such integers."""
    inputs = integers(dtype, width)
    c, a, b = (inputs[name].double().numpy() for name in ("c", "a", "b"))
    got = _run(device, Case("mma", (len(c), a.shape[-1]), dtype=dtype), inputs)
    return int((got != a @ b.swapaxes(1, 2) + c).sum())


def integers(dtype: str, width: int) -> Tensors:
    """64 products and an accumulator whose magnitudes add up to 2^width; in the last 8 problems to little over half."""
    rng = np.random.default_rng(width)
    a, b = (rng.integers(-8, 9, (48, rows, 64)).astype(float) for rows in (16, 8))
    a[16:32], b[16:32] = abs(a[16:32]), abs(b[16:32])  # the sum itself reaches 2^width
    room = 2.0**width - abs(a) @ abs(b).swapaxes(1, 2)
    c = room * np.where(np.arange(48) < 32, 1.0, -1.0)[:, None, None]
    a[40:, :, 0], b[40:, :, 0] = 2.0 ** (width // 2), 2.0 ** (width - 1 - width // 2)  # one product is the large one
    c[40:] = 0.0
    to_dtype = {name: torch.from_numpy(x).to(DTYPES[dtype]) for name, x in (("a", a), ("b", b))}
    return {**to_dtype, "c": torch.from_numpy(c).float()}


def _past_exact(device: Device) -> float:
    """2^24 and 15 ones, less 2^24: past the exact integers an odd sum cannot be held."""
    vectors = Vectors(np.array([2.0**24]), np.array([[1.0] * 15 + [0.0]]), np.ones((1, STEP)))
    return float(sums(device, DTYPE_NAMES[0], vectors)[0] - 2.0**24)
