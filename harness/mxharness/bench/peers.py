"""Libraries that multiply by MXFP4 weights on a GPU, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from mxharness import mxfp4
from mxharness.bench.work import Rival
from mxharness.mxfp4 import Quantized
from mxharness.timing import Call

Xs = list[torch.Tensor]
Stored = tuple[Quantized, ...]


def product_rivals(xs: Xs, stored: Stored, copies: int) -> tuple[dict[str, Rival], dict[str, str]]:
    """Rivals of x W^T, and those that are absent with the reason. A weight is laid out as a library wants it first."""
    rivals, absent = {}, {}
    for name, (module, prepare) in PEERS.items():
        if not _installed(module):
            absent[name] = f"{module} is not installed"
            continue
        try:
            call = prepare(xs, stored, copies)
        except Exception as error:  # whatever somebody else's code raises
            absent[name] = f"cannot be prepared: {type(error).__name__}: {error}"
        else:
            rivals[name] = Rival(call, copies, exact=False)
    return rivals, absent


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _torchao(xs: Xs, stored: Stored, copies: int) -> Call:
    """Its emulation: decoded for every call, then torch's product."""
    from torchao.prototype.mx_formats.mx_tensor import to_dtype

    def call(i: int) -> torch.Tensor:
        x, (codes, scales) = xs[i % copies], stored[i % copies]
        powers = scales.view(torch.float8_e8m0fnu)
        return torch.nn.functional.linear(x, to_dtype(codes, powers, torch.float4_e2m1fn_x2, mxfp4.BLOCK, x.dtype))

    return call


PEERS: dict[str, tuple[str, Callable[[Xs, Stored, int], Call]]] = {
    "torchao": ("torchao", _torchao),
}
"""By the name in a table, the module to import and what makes its calls."""
