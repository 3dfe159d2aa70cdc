"""Name what failing elements hold instead: zeros, a multiple, an offset, the values of other places."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mxharness.bounds import UNIT_ROUNDOFF
from mxharness.mxfp4 import BLOCK
from mxharness.pattern import Places, indices

_SHARE = 0.95
"""Of the failing elements, for which a sentence must be true."""
_ENOUGH = 4
"""Fewer failing elements agree by chance."""


_SAME = 0.02
"""So near 1 a factor is none, but a rounding."""


def describe(got: torch.Tensor, want: torch.Tensor, bad: torch.Tensor, places: Places | None = None) -> str:
    """One phrase for an output and its float64 reference, both of bad's shape; empty where nothing simple fits."""
    known = bad & want.isfinite()
    y = got.double()
    if int(known.sum()) < _ENOUGH:
        return ""
    room = 4 * UNIT_ROUNDOFF.get(got.dtype, 0.0)

    def fits(candidate: torch.Tensor) -> bool:
        near = (y - candidate).abs() <= room * candidate.abs()
        return int((near & known).sum()) >= _SHARE * int(known.sum())

    told = known & (want != 0)
    if int(told.sum()) >= _ENOUGH:
        if fits(torch.zeros_like(want)):
            return "they are 0"
        if got.is_floating_point():
            factor = float((y[told] / want[told]).nan_to_num(0.0, 0.0, 0.0).median())
            near = torch.tensor(abs(factor), dtype=torch.float64).log2().round()
            for exact in (float(near.exp2()) * (1 if factor > 0 else -1), factor):
                if abs(exact - 1) > _SAME and fits(want * exact):
                    return "the sign is wrong" if exact == -1 else f"they are {exact:.4g} times what they should be"
    if not got.is_floating_point():
        offset = int((y - want)[known].median())
        if offset and fits(want + offset):
            return f"they are {abs(offset)} too {'large' if offset > 0 else 'small'}"
    return next((phrase for phrase, candidate in _elsewhere(want, places) if fits(candidate)), "")


def _elsewhere(want: torch.Tensor, places: Places | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The reference of another place, in the place of each element."""
    for axis, name in enumerate(_axes(want.shape, places)):
        size = want.shape[axis]
        if size < 2:
            continue
        for step, word in ((-1, "next"), (1, "previous")):
            yield f"they hold what the {word} {name} should", want.roll(step, axis)
        exchanged = torch.arange(size) ^ 1
        yield f"neighbours (even and odd {name}) are exchanged", want.index_select(axis, exchanged.clamp_max(size - 1))
        half = torch.arange(size).reshape(2, -1).T.flatten() if size % 2 == 0 else None
        if half is not None:
            yield f"the two halves of the {name} are read as alternating", want.index_select(axis, half)
            yield f"alternating {name} are read as two halves", want.index_select(axis, half.argsort())
            yield f"the two halves of the {name} are exchanged", want.roll(size // 2, axis)
    if want.shape[-1] % BLOCK == 0:
        blocks, order = want.reshape(*want.shape[:-1], -1, BLOCK), torch.arange(BLOCK).reshape(2, -1).T.flatten()
        yield "the halves of each block of 32 are read as alternating", blocks[..., order].flatten(-2)
        yield "what alternates in each block of 32 is read as two halves", blocks[..., order.argsort()].flatten(-2)
    if want.ndim == 2 and min(want.shape) > 1:
        yield "the result is transposed", want.T.reshape(want.shape)
        yield "the result is transposed", want.reshape(want.shape[::-1]).T


def _axes(shape: torch.Size, places: Places | None) -> list[str]:
    """A name for every axis: the first place that counts along it alone."""
    names = list(indices(shape))
    for axis, size in enumerate(shape):
        for name, place in (places or {}).items():
            lonely = place.ndim == len(shape) and place.shape[axis] == size == place.numel()
            if lonely and torch.equal(place.flatten(), torch.arange(size)):
                names[axis] = name
                break
    return names
