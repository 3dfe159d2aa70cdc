"""Where along K a contraction goes wrong: the kernel again, on inputs of which only a part is left.

K does not show in an output. So one operand is zeroed but for one K block, or one nibble of each byte, and the kernel
is judged against the reference of those inputs; what still fails holds the fault. A bounded number of launches, after a
failure only, on the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mxharness import mxfp4
from mxharness.op import Operand
from mxharness.pattern import describe

STEP = 16
"""Products that a tensor core adds at once."""
GROUPS = 16
"""K blocks are tried one by one up to this number, in groups above it."""


@dataclass(frozen=True)
class Trial:
    """The failing output's operand, and whether the output is still wrong with it."""

    operand: torch.Tensor
    place: Operand
    fails: Callable[[torch.Tensor], bool | None]
    """None where the kernel left nothing to judge."""

    @property
    def length(self) -> int:
        """K."""
        count = self.operand.shape[-self.place.dims :].numel()
        return 2 * count if self.operand.dtype == torch.uint8 else count

    def wrong(self, keep: torch.Tensor) -> bool | None:
        """Whether the output is wrong where the operand is zero but for the k in `keep` (K), bool."""
        return self.fails(masked(self.operand, self.place.dims, keep))


def masked(operand: torch.Tensor, dims: int, keep: torch.Tensor) -> torch.Tensor:
    """The operand, its last `dims` dimensions being K, with zeros where `keep` is false; bytes hold two codes."""
    if operand.dtype == torch.uint8:  # low nibble first; code 0 is zero
        low, high = keep[0::2].to(torch.uint8), keep[1::2].to(torch.uint8)
        return operand & (low * 0x0F + high * 0xF0).reshape(operand.shape[-dims:])
    return torch.where(keep.reshape(operand.shape[-dims:]), operand, torch.zeros_like(operand))


def along_k(trial: Trial) -> str:
    """Which K blocks and nibbles the fault sits in; empty where all of K is alike."""
    K = trial.length
    k = torch.arange(K)
    nothing = trial.wrong(k < 0)
    if nothing is None:
        return ""
    if nothing:
        return "with every product zero, too, so not in the products"
    block = k // mxfp4.BLOCK
    count = int(block[-1]) + 1
    bad = _bad_blocks(trial, block, count)
    if bad is None:
        return ""
    if not bad.any():
        return _joined(trial, block, count)
    inside = bad[block]
    parts = (("even nibble", k % 2 == 0), ("odd nibble", k % 2 == 1))
    steps = (("first half of each step of 16", k % STEP < STEP // 2), ("second half of each step of 16", k % STEP >= 8))
    part = _one_of(trial, inside, parts)
    part = f"every {part}" if part else (f"the {found}" if (found := _one_of(trial, inside, steps)) else "")
    if bad.all():
        return part
    first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
    blocks = f"{describe(bad, {'K block': torch.arange(count)})}, k {first} to {last}"
    return f"{part} of {blocks}" if part else blocks


def _one_of(trial: Trial, inside: torch.Tensor, parts: tuple[tuple[str, torch.Tensor], ...]) -> str:
    """The name of the one part that is wrong where the others are right."""
    wrong = [name for name, here in parts if trial.wrong(inside & here)]
    return wrong[0] if len(wrong) == 1 else ""


def _bad_blocks(trial: Trial, block: torch.Tensor, count: int) -> torch.Tensor | None:
    """Which K blocks fail alone (count) bool: each, or groups of them and then those of no more than two groups."""
    size = -(-count // GROUPS)
    group = torch.arange(count) // size
    bad = torch.zeros(count, dtype=torch.bool)
    for g in range(int(group[-1]) + 1):
        wrong = trial.wrong((group == g)[block])
        if wrong is None:
            return None
        bad[group == g] = wrong
    if 1 < size <= GROUPS and 0 < len(set(group[bad].tolist())) <= 2:
        for b in bad.nonzero().flatten().tolist():
            bad[b] = bool(trial.wrong(block == b))
    return bad


def _joined(trial: Trial, block: torch.Tensor, count: int) -> str:
    """For blocks that are right one by one: how many of the first are wrong together."""
    low = _first(lambda b: trial.wrong(block <= b), count)
    return f"no K block alone, but K blocks 0 to {low} together, so the way their sums are joined" if low else ""


def first_step(trial: Trial) -> str:
    """The step of 16 products with which the result is wrong and without which it is right."""
    k = torch.arange(trial.length)
    step = _first(lambda s: trial.wrong(k // STEP <= s), -(-trial.length // STEP))
    return f"the first K step that explains it is {step}, k {STEP * step} to {STEP * step + STEP - 1}"


def _first(wrong: Callable[[int], bool | None], count: int) -> int:
    """The smallest i < count with wrong(i), by halving; wrong(count - 1) is known."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(middle) else (middle + 1, high)
    return low
