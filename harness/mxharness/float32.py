"""Float32 arithmetic, each operation rounded once to nearest even: what numpy has is used, what it lacks is here.

numpy's +, -, *, / and sqrt on float32 arrays are correctly rounded; a fused multiply-add it has not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


def odd(nearest: Wide, rest: Wide) -> Wide:
    """Of an exact sum nearest + rest the float64 that any rounding to float32 takes for the sum itself.

    Rounding to odd: where bits are lost the last one kept is 1 (Boldo and Melquiond, IEEE TC 57(4), 2008). float64 has
    29 bits more than float32, subnormal numbers included; the proof needs 2.
    """
    lost = (rest != 0) & (nearest.view(np.int64) % 2 == 0) & np.isfinite(nearest)
    return np.where(lost, np.nextafter(nearest, np.where(rest > 0, np.inf, -np.inf)), nearest)


def sum_of_two(x: Wide, y: Wide) -> Wide:
    """X + y rounded to odd; what is lost is found exactly (Knuth's TwoSum) while nothing overflows."""
    total = x + y
    part = total - x
    return odd(total, (x - (total - part)) + (y - part))


def fma(a: Array | np.float32, b: Array | np.float32, c: Array | np.float32) -> Array:
    """A b + c, rounded once. The product of two float32 has 48 bits and an exponent of float64: it is exact there."""
    product = np.multiply(a, b, dtype=np.float64)
    return sum_of_two(product, np.broadcast_to(np.float64(c), product.shape)).astype(np.float32)


def horner(coefficients: tuple[float, ...], x: Array) -> Array:
    """A polynomial, highest power first, by fused multiply-adds; coefficients are rounded to float32."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma(total, x, np.float32(coefficient))
    return total
