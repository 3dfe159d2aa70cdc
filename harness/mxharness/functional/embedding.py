"""Embeddings from an MXFP4 table: rows by token id, decoded on the way or beforehand, and position embeddings.

Source: the user's embedding kernels (lookup, cached, batch, positions); decoding as OCP MX 1.0, sections 5.3.3, 5.4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import check_tensors, check_weight, device_of, integer
from mxharness.functional.quantize import dequantize
from mxharness.mxfp4 import BLOCK, Quantized

_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MOST_THREADS = 512


def embedding_lookup(
    ids: torch.Tensor,
    table: Quantized,
    *,
    dtype: torch.dtype = torch.bfloat16,
    padding_id: int | None = None,
    K: int | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (T, K) float32, bf16 or fp16: row ids[t] of the table, exact, rounded once to `dtype`; +0 for padding_id.

    ids (T) int32 or int64; table: codes (V, Kp/2), scales (V, Kp/32) uint8. K defaults to Kp and may cut the last
    block short. Raises UserError, before anything is launched, for an id that is not in 0..V-1, and for shapes, dtypes
    or alignment that do not fit. Looking at the ids waits for a GPU; validate=False leaves it out (graph capture), and
    then the row of such an id is NaN. Nothing outside the table is ever read.
    """
    device = device_of(ids, device, "ids")
    return _packed(ids, table, 1, dtype, padding_id, K, validate, device)


def embedding_lookup_batch(
    ids: torch.Tensor,
    table: Quantized,
    *,
    dtype: torch.dtype = torch.bfloat16,
    padding_id: int | None = None,
    K: int | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (B, T, K) for B sequences of ids (B, T) in one launch; else as `embedding_lookup`."""
    device = device_of(ids, device, "ids")
    return _packed(ids, table, 2, dtype, padding_id, K, validate, device)


@dataclass
class EmbeddingCache:
    """A table dequantised once by `embedding_cache`, for `embedding_lookup_cached`. `release` gives it back."""

    shape: tuple[int, int]
    """(V, K)."""
    table: torch.Tensor | None
    """(V, K) float32, bf16 or fp16."""

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies beyond the MXFP4 table itself; 0 once released."""
        return 0 if self.table is None else self.table.nbytes

    def release(self) -> None:
        """Drop the buffer. Idempotent."""
        self.table = None


def embedding_cache(
    table: Quantized, dtype: torch.dtype = torch.bfloat16, K: int | None = None, *, device: Device | None = None
) -> EmbeddingCache:
    """The table (V, K), dequantised once to `dtype`. Raises as `dequantize`."""
    values = dequantize(table, dtype, K, device=device)
    return EmbeddingCache((values.shape[0], values.shape[1]), values)


def embedding_lookup_cached(
    ids: torch.Tensor,
    cache: EmbeddingCache,
    *,
    padding_id: int | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (T, K) from a table dequantised beforehand: the bits of `embedding_lookup` of the cache's dtype.

    Raises UserError for a cache that was released, else as `embedding_lookup`.
    """
    device = device_of(ids, device, "ids")
    if not isinstance(cache, EmbeddingCache):
        raise UserError(f"cache must be what embedding_cache() gives, not {type(cache).__name__}")
    if cache.table is None:
        raise UserError("this embedding cache was released; make another with embedding_cache()")
    check_tensors(device, table=cache.table)
    if tuple(cache.table.shape) != cache.shape or cache.table.dtype not in _SUFFIX:
        raise UserError(f"the cache's table must be {cache.shape}, not {tuple(cache.table.shape)} {cache.table.dtype}")
    V, K = cache.shape
    _check_ids(device, ids, 1, V, padding_id, validate=validate)
    y = device.empty((len(ids), K), cache.table.dtype)
    _lookup(device, y, ids, padding_id, V, "dense", cache.table)
    return y


def add_position_embeddings(
    x: torch.Tensor,
    positions: torch.Tensor | Quantized,
    start: int | torch.Tensor = 0,
    *,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y = x + positions, a float32 sum rounded once to x's dtype; x (T, K) or (B, T, K) float32, bf16 or fp16.

    positions: (P, K) of x's dtype, or an MXFP4 table (codes (P, Kp/2), scales (P, Kp/32), Kp = K rounded up to 32).
    Token t of a sequence has position start + t. start is a number, or an int32 or int64 tensor along x's first
    dimension: where each of B sequences starts, or the position of each of T tokens.
    Raises UserError for a position that is not in 0..P-1, and for shapes, dtypes or alignment that do not fit.
    validate=False does not look into a tensor `start`; a position that does not exist then gives NaN.
    """
    device = device_of(x, device, "x")
    if x.dtype not in _SUFFIX:
        raise UserError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise UserError(f"x must be (T, K) or (B, T, K) with no size 0, not {tuple(x.shape)}")
    check_tensors(device, x=x)
    K = x.shape[-1]
    P, kind, table = _positions(device, positions, x)
    offsets = start if isinstance(start, torch.Tensor) else None
    span = x.shape[-2] if offsets is None or x.ndim == 3 else 1
    if offsets is not None:
        _check_integers(device, offsets, "start")
        if tuple(offsets.shape) != x.shape[:1]:
            raise UserError(
                f"start must be ({x.shape[0]},) along x's first dimension, or a number, not {tuple(offsets.shape)}"
            )
        outside = (offsets < 0) | (offsets > P - span) if validate else None
        if outside is not None and bool(outside.any()):
            at = int(outside.int().argmax())
            raise UserError(f"start[{at}] is {int(offsets[at])}: {_reach(span, P)}")
    elif not isinstance(start, int) or not 0 <= start <= P - span:
        raise UserError(f"start is {start}: {_reach(span, P)}")
    rows = x.numel() // K
    y = device.empty(tuple(x.shape), x.dtype)
    device.launch(
        "embedding.cu", f"position_{kind}_{_SUFFIX[x.dtype]}", (rows,), _block(K),
        y, x, *table, offsets, int(offsets is not None and offsets.dtype == torch.int64),
        np.int64(start if isinstance(start, int) else 0), span, np.int64(P), K,
    )  # fmt: skip
    return y


def _packed(
    ids: torch.Tensor,
    table: Quantized,
    ndim: int,
    dtype: torch.dtype,
    padding_id: int | None,
    K: int | None,
    validate: bool,
    device: Device,
) -> torch.Tensor:
    V, padded = check_weight(device, table)
    if dtype not in _SUFFIX:
        raise UserError(f"an embedding is float32, bfloat16 or float16, not {dtype}")
    K = padded if K is None else integer(K, "K")
    if not padded - BLOCK < K <= padded:
        raise UserError(f"K = {K} does not fit a table of {padded} columns; it must be in {padded - 31}..{padded}")
    _check_ids(device, ids, ndim, V, padding_id, validate=validate)
    y = device.empty((*ids.shape, K), dtype)
    _lookup(device, y, ids, padding_id, V, "packed", *table)
    return y


def _lookup(
    device: Device, y: torch.Tensor, ids: torch.Tensor, padding_id: int | None, V: int, kind: str, *table: torch.Tensor
) -> None:
    """Launch on checked tensors."""
    K = y.shape[-1]
    device.launch(
        "embedding.cu", f"embedding_{kind}_{_SUFFIX[y.dtype]}", (ids.numel(),), _block(K),
        y, *table, ids, int(ids.dtype == torch.int64), np.int64(V), K,
        np.int64(-1 if padding_id is None else integer(padding_id, "padding_id")),
    )  # fmt: skip


def _block(K: int) -> tuple[int]:
    """Threads for a row: whole warps, no more than its groups of 8 need."""
    return (min(-(-K // (8 * 32)) * 32, _MOST_THREADS),)


def _check_integers(device: Device, tensor: torch.Tensor, name: str) -> None:
    """Of any alignment, so that a row of a batch of ids will do."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{name} must be int32 or int64, not {tensor.dtype}")
    if tensor.device.type != device.torch_device.type:
        raise UserError(f"{name} is on {tensor.device}, the kernels run on {device.torch_device}")
    if not tensor.is_contiguous():
        raise UserError(f"{name} must be contiguous, it has strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def _check_ids(device: Device, ids: torch.Tensor, ndim: int, V: int, padding_id: int | None, *, validate: bool) -> None:
    if ids.ndim != ndim or 0 in ids.shape:
        raise UserError(f"ids must be {'(T)' if ndim == 1 else '(B, T)'} with at least one id, not {tuple(ids.shape)}")
    _check_integers(device, ids, "ids")
    if padding_id is not None and not 0 <= integer(padding_id, "padding_id") < V:
        raise UserError(f"padding_id is {padding_id}, the vocabulary has {V} ids (0..{V - 1})")
    outside = (ids < 0) | (ids >= V) if validate else None
    if outside is not None and bool(outside.any()):
        at = outside.nonzero()[0].tolist()
        raise UserError(f"ids{at} is {int(ids[tuple(at)])}, the vocabulary has {V} ids (0..{V - 1})")


def _positions(
    device: Device, positions: torch.Tensor | Quantized, x: torch.Tensor
) -> tuple[int, str, tuple[torch.Tensor, ...]]:
    """Rows of a table of positions, its kind and the kernel's arguments. UserError where it does not fit x (.., K)."""
    K = x.shape[-1]
    if isinstance(positions, torch.Tensor):
        if positions.dtype != x.dtype or positions.ndim != 2 or positions.shape[1] != K or 0 in positions.shape:
            raise UserError(
                f"positions must be (P, {K}) of x's {x.dtype}, or MXFP4, not {tuple(positions.shape)} {positions.dtype}"
            )
        check_tensors(device, positions=positions)
        return positions.shape[0], "dense", (positions,)
    P, padded = check_weight(device, positions, name="positions")
    if not padded - BLOCK < K <= padded:
        raise UserError(f"a table of positions with {padded} columns does not fit x's {K}")
    return P, "packed", tuple(positions)


def _reach(span: int, P: int) -> str:
    return f"{span} position{'s' if span > 1 else ''} from there are not within the table's {P} (0..{P - 1})"
