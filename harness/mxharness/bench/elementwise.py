"""What only moves numbers and changes them one by one or row by row: embedding, norms, SwiGLU, rotation."""

from __future__ import annotations

import torch

from mxharness import functional
from mxharness.bench.products import COPY, copying
from mxharness.bench.work import (
    DTYPES,
    SOME_COLUMNS,
    SOME_ROWS,
    Rival,
    Work,
    activations,
    corner,
    decoded,
    exact,
    first_row,
    generator,
    packed_bytes,
    weights,
)
from mxharness.device import Device
from mxharness.mxfp4 import Quantized
from mxharness.timing import copies_for

_EPS = 1e-5


def embedding(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """T rows of a table (V, K); each call reads others."""
    (V, K), kind = shape, DTYPES[dtype]
    table = weights(device, (V, K), 2)[0]
    nbytes = packed_bytes(rows, K) + 2 * rows * K + 8 * rows
    where = device.torch_device
    copies = copies_for(nbytes)
    ids = torch.randint(0, V, (copies, rows), device=where, generator=generator(where, 3))
    dense = decoded(device, (V, K), 2, kind)[0]
    some = ids[0][:SOME_ROWS]
    return Work(
        call=lambda i: functional.embedding_lookup(ids[i % copies], table, dtype=kind, validate=False, device=device),
        copies=copies,
        nbytes=nbytes,
        flops=0,
        golden=exact(Quantized(table.codes[some], table.scales[some]))[:, :SOME_COLUMNS],
        part=corner,
        row=first_row,
        alone=lambda: functional.embedding_lookup(ids[0][:1], table, dtype=kind, device=device),
        rivals={"torch embedding": Rival(lambda i: dense.index_select(0, ids[i % copies]), copies)},
        reference="torch embedding",
    )


def rms_norm(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """RMSNorm of (M, K) with float32 weights; torch's have the dtype of x."""
    return _norm(device, shape[0], rows, dtype, centred=False)


def layer_norm(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """LayerNorm of (M, K) with float32 weights and biases; torch's have the dtype of x."""
    return _norm(device, shape[0], rows, dtype, centred=True)


def _norm(device: Device, K: int, rows: int, dtype: str, *, centred: bool) -> Work:
    kind = DTYPES[dtype]
    nbytes = 4 * rows * K + (8 if centred else 4) * K
    xs = activations(device, copies_for(nbytes), (rows, K), kind)
    weight, bias = activations(device, 2, (K,), torch.float32)
    narrow, narrow_bias = weight.to(kind), bias.to(kind)
    some = xs[0][:SOME_ROWS].double()
    some = some - some.mean(-1, keepdim=True) if centred else some
    golden = some * (some.square().mean(-1, keepdim=True) + _EPS).rsqrt() * weight.double()

    def call(i: int, taken: int | None = None) -> torch.Tensor:
        x = xs[i % len(xs)][:taken]
        if centred:
            return functional.layer_norm(x, weight, bias, _EPS, device=device)
        return functional.rms_norm(x, weight, _EPS, device=device)

    def torch_call(i: int) -> torch.Tensor:
        x = xs[i % len(xs)]
        if centred:
            return torch.nn.functional.layer_norm(x, (K,), narrow, narrow_bias, _EPS)
        return torch.nn.functional.rms_norm(x, (K,), narrow, _EPS)

    name = "torch layer_norm" if centred else "torch rms_norm"
    return Work(
        call=call,
        copies=len(xs),
        nbytes=nbytes,
        flops=0,
        golden=(golden + bias.double() if centred else golden)[:, :SOME_COLUMNS],
        part=corner,
        row=first_row,
        alone=lambda: call(0, 1),
        rivals={name: Rival(torch_call, len(xs)), COPY: copying(device, nbytes)},
        reference=name,
    )


def swiglu(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """gpt-oss's activation of (M, 2 I), gates and ups interleaved; torch's takes several kernels."""
    (inner,), kind = shape, DTYPES[dtype]
    nbytes = 6 * rows * inner
    xs = activations(device, copies_for(nbytes), (rows, 2 * inner), kind)
    return Work(
        call=lambda i: functional.swiglu(xs[i % len(xs)], device=device),
        copies=len(xs),
        nbytes=nbytes,
        flops=0,
        golden=gated(xs[0][:SOME_ROWS].double())[:, :SOME_COLUMNS],
        part=corner,
        row=first_row,
        alone=lambda: functional.swiglu(xs[0][:1], device=device),
        rivals={"torch": Rival(lambda i: gated(xs[i % len(xs)]), len(xs)), COPY: copying(device, nbytes)},
        reference=COPY,
    )


def apply_rope(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """The rotation of (T, H, D), positions from 0; the table of angles counts once."""
    (H, D), kind = shape, DTYPES[dtype]
    nbytes = 4 * rows * H * D + 4 * rows * D
    xs = activations(device, copies_for(nbytes), (1, rows, H, D), kind)
    rope = functional.Rope(device.upload(functional.rope_table(max(rows, 2), D)))
    start = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
    cos, sin = (part[:rows, None].to(kind) for part in rope.table.unbind(-1))
    angles = rope.table[:SOME_ROWS, None].double().unbind(-1)

    def torch_call(i: int) -> torch.Tensor:
        return rotated(xs[i % len(xs)], cos, sin)

    return Work(
        call=lambda i: functional.apply_rope(xs[i % len(xs)], rope, start, validate=False, device=device),
        copies=len(xs),
        nbytes=nbytes,
        flops=0,
        golden=rotated(xs[0][:, :SOME_ROWS].double(), *(part[:rows] for part in angles)),
        part=lambda y: y[:, :SOME_ROWS],
        row=lambda y: y[:, :1],
        alone=lambda: functional.apply_rope(xs[0][:, :1].contiguous(), rope, start, device=device),
        rivals={"torch": Rival(torch_call, len(xs)), COPY: copying(device, nbytes)},
        reference=COPY,
    )


def gated(y: torch.Tensor) -> torch.Tensor:
    """gpt-oss's activation of interleaved gates and ups (.., 2 I)."""
    gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Elements i and i + D/2 of x (.., T, H, D) turned by angles (T, 1, D/2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
