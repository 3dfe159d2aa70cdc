"""Which unit of the family a matrix instruction is: directed inputs rule out members, one property after another.

As Fasi, Higham, Mikaitis and Pranesh do (PeerJ CS 2021): large terms that cancel show what became of the small ones
between them. Every member of FAMILY is told from every other by these inputs; random data must then confirm the one
that is left (probe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import get_args, get_type_hints

import numpy as np

from mxharness import tensor_core
from mxharness.tensor_core import HOPPER, STEP, Floats, Unit

STEPS = (4, 8, 16)
FRACTION_BITS = tuple(range(22, 31))


@dataclass(frozen=True)
class Known:
    """A published unit."""

    name: str
    unit: Unit
    source: str
    measured: bool = False
    """Whether this project measured it."""


_MMA_SIM = "Xie, Wang, Yang, Yang, MMA-Sim, arXiv 2511.10909"
_FASI = "Fasi, Higham, Mikaitis, Pranesh, PeerJ CS 7:e330, 2021"
KNOWN = (
    Known("Hopper", HOPPER, f"measured on an H100; {_MMA_SIM}, who say the same of Blackwell", measured=True),
    Known("Ampere and Ada", Unit(8, 24), f"{_FASI} (A100); {_MMA_SIM}"),
    Known("Volta", Unit(4, 23), f"{_FASI} (V100); {_MMA_SIM}"),
)


def _choices(name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(Unit)[name])


def _family() -> tuple[Unit, ...]:
    rest = [_choices(name) for name in ("rounding", "accumulator", "subnormals")]
    aligned = [
        Unit(step, bits, alignment=alignment, exponents=exponents)  # type: ignore[arg-type]  # names from the Literals
        for step, bits, alignment, exponents in product(
            STEPS, FRACTION_BITS, _choices("alignment"), _choices("exponents")
        )
    ]
    exact = [Unit(step, None) for step in STEPS]  # loses nothing to alignment
    return tuple(
        replace(unit, rounding=rounding, accumulator=accumulator, subnormals=subnormals)  # type: ignore[arg-type]  # as above
        for unit in (*aligned, *exact)
        for rounding, accumulator, subnormals in product(*rest)
    )


FAMILY = _family()


def neighbours(unit: Unit) -> dict[str, Unit]:
    """The family's members that differ from a unit in one field, fraction bits by up to two, by that field's value."""
    near = {f"step {step}": replace(unit, step=step) for step in STEPS if step != unit.step}
    if unit.fraction_bits is None:
        near[f"{FRACTION_BITS[-1]} fraction bits"] = replace(unit, fraction_bits=FRACTION_BITS[-1])
        fields: Sequence[str] = ("rounding", "accumulator", "subnormals")
    else:
        for bits in range(unit.fraction_bits - 2, unit.fraction_bits + 3):
            if bits != unit.fraction_bits:
                near[f"{bits} fraction bits"] = replace(unit, fraction_bits=bits)
        fields = ("alignment", "rounding", "accumulator", "exponents", "subnormals")
    for name in fields:
        for value in _choices(name):
            if value != getattr(unit, name):
                near[f"{name} {value}"] = replace(unit, **{name: value})  # type: ignore[arg-type]  # as above
    return near


@dataclass(frozen=True)
class Vectors:
    """Sums of one instruction: c (V) float32 values, a and b (V, 16) values of the dtype, all as float64."""

    c: Floats
    a: Floats
    b: Floats


def _vectors(rows: Sequence[tuple[float, dict[int, float], dict[int, float]]]) -> Vectors:
    """From (c, place to a, place to b); b is 1 where a says something and it does not."""
    a, b = np.zeros((len(rows), STEP)), np.zeros((len(rows), STEP))
    for row, (_, left, right) in enumerate(rows):
        for place, value in left.items():
            a[row, place] = value
            b[row, place] = right.get(place, 1.0)
    return Vectors(np.array([c for c, _, _ in rows]), a, b)


def _step_vectors() -> Vectors:
    """2^30 - 2^30 with small terms everywhere else: which of them are added before, with and after the two.

    The two stand at every pair of places, also with the accumulator as the first: the pairs in one step share it with
    the terms that vanish.
    """
    big, small, rows = 2.0**15, 2.0**-8, []
    for first, last in combinations(range(STEP), 2):
        left = dict.fromkeys(range(STEP), small) | {first: big, last: -big}
        rows.append((3 * small, left, {first: big, last: big}))
    for place in range(STEP):
        left = dict.fromkeys(range(STEP), small) | {place: -big}
        rows.append((big * big, left, {place: big}))
    return _vectors(rows)


def _bit_vectors() -> Vectors:
    """X + t - X inside one step, X 2^8 or 2.25 * 2^8, t of falling size and both signs: how much of t is left."""
    rows = []
    for power, factor, sign, top in product(range(-25, -9), (1.0, 1.5), (1.0, -1.0), (16.0, 24.0)):
        t = sign * factor * 2.0 ** (power // 2)  # two factors, so that fp16 holds them
        right = {0: top, 1: 2.0 ** (power - power // 2), 2: top}
        rows.append((0.0, {0: top, 1: t, 2: -top}, right))
        rows.append((sign * factor * 2.0**power, {0: top, 2: -top}, right))
    return _vectors(rows)


def _rounding_vectors() -> Vectors:
    """Sums of more than 24 bits, both signs or one, with and without an accumulator of another size."""
    rng = np.random.default_rng(0)
    shape = (256, STEP)
    a, b = (rng.integers(64, 128, shape) / 64 for _ in range(2))
    a[:128] *= rng.choice([-1.0, 1.0], (128, STEP)) * 2.0 ** rng.integers(-6, 7, (128, STEP))
    c = rng.choice([0.0, 1.0, 2.0**-12, 2.0**12], shape[0]) * rng.standard_normal(shape[0]).astype(np.float32).astype(
        float
    )
    return Vectors(c, a, b)


def _subnormal_vectors(dtype: str) -> Vectors:
    """Operands, accumulators and results below the smallest normal number."""
    smallest = 2.0 ** tensor_core.SMALLEST_EXPONENT[dtype]
    rows = [(0.0, {place: smallest / 2}, {place: 2.0**10}) for place in range(STEP)]
    rows += [(2.0**-140, {}, {}), (-(2.0**-130), {}, {}), (2.0**-126, {}, {})]
    return _vectors(rows)


def directed(dtype: str) -> dict[str, Vectors]:
    """The inputs that tell the family's members apart, by the property they show, in the order of use."""
    return {
        "what is added at once": _step_vectors(),
        "how many bits are kept": _bit_vectors(),
        "how sums are rounded": _rounding_vectors(),
        "subnormal numbers": _subnormal_vectors(dtype),
    }


@dataclass(frozen=True)
class Fit:
    """What the directed inputs left of the family."""

    units: tuple[Unit, ...]
    failed: str = ""
    """The property in which the instruction is like no member that agreed until then; empty where units is not."""


def fit(run: Callable[[Vectors], Floats], dtype: str) -> Fit:
    """The members of FAMILY with the bits of `run`, which computes the sums (V) of some vectors on a device."""
    left = FAMILY
    for shown, vectors in directed(dtype).items():
        got = run(vectors)
        agreeing = tuple(unit for unit in left if differing(got, predicted(vectors, dtype, unit)) == 0)
        if not agreeing:
            return Fit((), shown)
        left = agreeing
    return Fit(left)


def predicted(vectors: Vectors, dtype: str, unit: Unit) -> Floats:
    """The sums (V) that a unit computes."""
    c, a, b = vectors.c[:, None, None], vectors.a[:, None], vectors.b[:, None]
    return tensor_core.mma(c, a, b, dtype, unit)[:, 0, 0]


def differing(got: Floats, want: Floats) -> int:
    """Elements whose bits differ; every NaN is the same NaN, the two zeros are not."""
    same = (got == want) & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want))
    return int((~same).sum())
