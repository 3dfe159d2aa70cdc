"""The bits of kernels/math.cuh in numpy: the same coefficients and roundings, written from their description.

A kernel's branch is a choice between two results here, both computed; 2^n is one exact scaling instead of two factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mxharness.float32 import Array, fma, horner

_F = np.float32
_ONE = _F(1)
EXP = (1.728078787e-4, 1.393460087e-3, 8.337888867e-3, 4.166648164e-2, 1.666664779e-1, 0.5)
"""(e^r - 1 - r) / r^2, |r| <= ln(2) / 2; this and the next ones highest power first."""
TANH = (2.010663040e-3, -8.028396405e-3, 2.163868956e-2, -5.393514410e-2, 1.333311200e-1, -3.333332837e-1)
"""(tanh(x) / x - 1) / u in u = x^2, x up to 0.65."""
ERF = (
    7.806890790e-5, -7.997851935e-4, 5.187162198e-3, -2.685334720e-2, 1.128357872e-1, -3.761262596e-1, 1.283791661e-1,
)  # fmt: skip
"""Of erf(x) / x - 1 in u = x^2, x up to 1."""
ERFC = (
    1.856373419e-4, -1.828078763e-3, 9.895947762e-3, -4.150532931e-2, -8.431166410e-1, -2.638967037, -1.849605560,
)  # fmt: skip
"""Of ln(1 - erf(1 + t)), t up to 2.93."""
LOG2_E, LN_2_HIGH, LN_2_LOW = _F(1.44269504), _F(6.93145752e-1), _F(1.42860677e-6)
LN_2, LN_2_REST = _F(6.93147182e-1), _F(-1.90465421e-9)


def exp(x: Array) -> Array:
    """e^x: x = n ln 2 + r in two parts, 1 + r + r^2 q(r) with what each of the sums lost, times 2^n rounded once."""
    inside = np.where((x >= -104) & (x <= _F(88.8)), x, _F(0))
    n = np.rint(np.multiply(inside, LOG2_E, dtype=np.float64)).astype(np.float32)
    near = fma(-n, LN_2_HIGH, inside)
    r = fma(-n, LN_2_LOW, near)
    result = _scaled(r, fma(-n, LN_2_LOW, near - r), n)
    result = np.where(x > _F(88.8), _F(np.inf), np.where(x < -104, _F(0), result))
    return np.where(np.isnan(x), x, result)


def exp2(x: Array) -> Array:
    """2^x = 2^n e^(f ln 2) for x = n + f: the product r and what it lost, then as exp."""
    inside = np.where((x >= -150) & (x <= 128), x, _F(0))
    n = np.rint(inside)
    f = inside - n
    r = f * LN_2
    result = _scaled(r, fma(f, LN_2_REST, fma(f, LN_2, -r)), n)
    result = np.where(x > 128, _F(np.inf), np.where(x < -150, _F(0), result))
    return np.where(np.isnan(x), x, result)


def _scaled(r: Array, lost: Array, n: Array) -> Array:
    """e^(r + lost) 2^n, the sums' losses carried along and the last product rounded once."""
    whole = _ONE + r
    behind = (_ONE - whole) + r
    mantissa = whole + (behind + fma(r * r, horner(EXP, r), lost))
    return np.ldexp(mantissa.astype(np.float64), n.astype(np.int64)).astype(np.float32)


def _over_sum(numerator: Array, large: Array, small: Array) -> Array:
    """Numerator / (large + small), and the first correction to it."""
    total = large + small
    lost = (large - total) + small
    inverse = _ONE / total
    quotient = numerator * inverse
    residual = fma(-quotient, lost, fma(-quotient, total, numerator))
    return fma(residual, inverse, quotient)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) from e^-|x|."""
    e, one = exp(-np.abs(x)), np.ones_like(x)
    return _over_sum(np.where(x < 0, e, one), one, e)


def tanh(x: Array) -> Array:
    """An odd polynomial up to 0.65, then 1 - 2 / (e^(2 |x|) + 1), then 1."""
    a = np.abs(x)
    u = a * a
    small = fma(horner(TANH, u) * u, a, a)
    middle = np.where((a > _F(0.65)) & (a <= 10), a, _ONE)
    large = _ONE - _over_sum(np.full_like(a, 2), exp(middle + middle), np.ones_like(a))
    return np.copysign(np.where(a > 10, _ONE, np.where(a > _F(0.65), large, small)), x)


def erf(x: Array) -> Array:
    """An odd polynomial up to 1, then 1 - e^(a polynomial), then 1."""
    a = np.abs(x)
    small = fma(horner(ERF, a * a), a, a)
    large = _ONE - exp(horner(ERFC, np.clip(a, _ONE, _F(4)) - _ONE))
    return np.copysign(np.where(a > _F(3.92), _ONE, np.where(a > 1, large, small)), x)


def rsqrt(x: Array) -> Array:
    """1 / sqrt(x), both rounded."""
    root: Array = np.sqrt(x)
    return _ONE / root


FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "exp": exp,
    "exp2": exp2,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "erf": erf,
    "rsqrt": rsqrt,
}


def compute(name: str, x: Array) -> Array:
    """f(x), float32 of any shape, as the kernel elementary_<name>; a NaN has any payload."""
    with np.errstate(all="ignore"):
        return FUNCTIONS[name](x)
