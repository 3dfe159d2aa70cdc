"""What MXFP4 saves in memory, counted exactly: 17 bytes for a block of 32, each row padded to whole blocks.

Rows of a multiple of 32 shrink to 4.25 bits an element, 3.76 times less than 16 bit; what stays unquantised beside them
(biases, a router) brings the whole closer to 1. Plain arithmetic: nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mxharness.errors import UserError
from mxharness.functional.common import integer
from mxharness.mxfp4 import nbytes

_HALF, _FLOAT = 2, 4


@dataclass(frozen=True)
class Savings:
    """Bytes of the same tensors in 16 bit and with their weights in MXFP4."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the quantised weights."""
    mxfp4: int
    """Bytes of codes and scales."""
    unquantised: int
    """Bytes, beside them, of what stays in 16 bit or is held in float32."""
    sixteen_bit: int
    """Bytes of everything in 16 bit."""

    @property
    def total(self) -> int:
        """Bytes held with the weights in MXFP4."""
        return self.mxfp4 + self.unquantised

    @property
    def saved(self) -> int:
        """Bytes saved; negative where padding and float32 cost more than quantising gains."""
        return self.sixteen_bit - self.total

    @property
    def ratio(self) -> float:
        """How many times less memory: at most 32 * 16 / 136 = 3.7647."""
        return self.sixteen_bit / self.total

    def __str__(self) -> str:
        return f"{self.total:,} bytes instead of {self.sixteen_bit:,}: {self.ratio:.2f}x less, {self.saved:,} saved"


def vram_savings(*shapes: Sequence[int], kept: int = 0, widened: int = 0) -> Savings:
    """Bytes of weights of these shapes (.., K) in 16 bit and in MXFP4.

    kept: elements beside them that are 16 bit in both (a router); widened: elements that are 16 bit in a 16-bit model
    and float32 beside MXFP4 weights (biases). Raises UserError for no shape, a scalar, and sizes that are not positive
    integers.
    """
    if not shapes:
        raise UserError("vram_savings needs at least one shape, such as (4096, 4096)")
    for shape in shapes:
        if not isinstance(shape, Sequence):
            raise UserError(f"a shape is a sequence of sizes such as (4096, 4096), not {shape!r}")
        _check_sizes(**{f"size {i} of {tuple(shape)}": size for i, size in enumerate(shape)})
    if integer(kept, "kept") < 0 or integer(widened, "widened") < 0:
        raise UserError(f"numbers of elements cannot be negative: kept {kept}, widened {widened}")
    weights = tuple(tuple(shape) for shape in shapes)
    return Savings(
        shapes=weights,
        mxfp4=sum(map(nbytes, weights)),
        unquantised=_HALF * kept + _FLOAT * widened,
        sixteen_bit=_HALF * (sum(map(prod, weights)) + kept + widened),
    )


def gemm_vram_savings(N: int, K: int, *, bias: bool = False) -> Savings:
    """Of a weight (N, K), its bias (N) in float32. Raises UserError for sizes that are not positive integers."""
    _check_sizes(N=N, K=K)
    return vram_savings((N, K), widened=N if bias else 0)


def embedding_vram_savings(V: int, K: int) -> Savings:
    """Of a token table (V, K). Raises as `gemm_vram_savings`."""
    _check_sizes(V=V, K=K)
    return vram_savings((V, K))


def lm_head_vram_savings(V: int, K: int) -> Savings:
    """Of an LM head (V, K); one tied to the embedding shares its table, which counts once.

    Raises as `gemm_vram_savings`.
    """
    _check_sizes(V=V, K=K)
    return vram_savings((V, K))


def attention_vram_savings(
    hidden: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *, bias: bool = False
) -> Savings:
    """Of the projections q (heads D, hidden), k and v (kv_heads D, hidden) and output (hidden, heads D), D = head_dim.

    kv_heads defaults to heads and head_dim to hidden / heads; bias: all four have one, in float32. Raises as
    `gemm_vram_savings`, and for hidden not divisible by heads where head_dim is left out.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    _check_sizes(hidden=hidden, heads=heads, kv_heads=kv_heads)
    if head_dim is None:
        if hidden % heads:
            raise UserError(f"hidden = {hidden} is not divisible by heads = {heads}; give head_dim")
        head_dim = hidden // heads
    _check_sizes(head_dim=head_dim)
    q, kv = heads * head_dim, kv_heads * head_dim
    widened = q + 2 * kv + hidden if bias else 0
    return vram_savings((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), widened=widened)


def ffn_vram_savings(hidden: int, intermediate: int, gated: bool = False, *, bias: bool = False) -> Savings:
    """Of up (intermediate, hidden) and down (hidden, intermediate), and of a gate like up where `gated`.

    bias: each has one, in float32. Raises as `gemm_vram_savings`.
    """
    _check_sizes(hidden=hidden, intermediate=intermediate)
    ups = 2 if gated else 1
    shapes = [(intermediate, hidden)] * ups + [(hidden, intermediate)]
    return vram_savings(*shapes, widened=ups * intermediate + hidden if bias else 0)


def moe_vram_savings(
    hidden: int, intermediate: int, experts: int, *, bias: bool = True, router: bool = True
) -> Savings:
    """Of experts' gate and up (E, 2 intermediate, hidden) and down (E, hidden, intermediate), as gpt-oss has them.

    bias: both have one per expert, and the router one, in float32; router: its weight (E, hidden), which stays in
    16 bit, counts too. Raises as `gemm_vram_savings`.
    """
    _check_sizes(hidden=hidden, intermediate=intermediate, experts=experts)
    widened = experts * (2 * intermediate + hidden + (1 if router else 0)) if bias else 0
    return vram_savings(
        (experts, 2 * intermediate, hidden),
        (experts, hidden, intermediate),
        kept=experts * hidden if router else 0,
        widened=widened,
    )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise UserError(f"{name} must be a positive integer, not {size!r}")
