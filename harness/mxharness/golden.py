"""References: the shortest code that says what is right, in float64, sharing nothing with what it judges.

They are computed where their arguments are. The tables are copied there at every call: one that stayed on a GPU could
be written over by the kernel that is judged.
"""

from __future__ import annotations

import torch

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
"""E2M1 magnitudes by code (OCP MX 1.0, table 5)."""
SCALES = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
"""E8M0 by byte; 255 is NaN."""


def quantize(x: torch.Tensor, scale_rule: str, tie_rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (..., Kp) and scale bytes (..., Kp/32), uint8, of finite float64 x (..., K), rows padded to Kp = 32 n.

    Exact for every x that is a float32. The rules are mxfp4.quantize's.
    """
    values, powers = VALUES.to(x.device), SCALES.to(x.device)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).reshape(*x.shape[:-1], -1, 32)
    amax = blocks.abs().amax(-1)
    if scale_rule in ("floor", "even"):  # the largest scale with target * scale <= amax
        target = {"floor": 4.0, "even": 3.5}[scale_rule]
        scales = torch.searchsorted(target * powers, amax, right=True) - 1
    else:  # the smallest scale with target * scale >= amax
        target = {"rceil": 6.0, "ceil": 4.0}[scale_rule]
        scales = torch.searchsorted(target * powers, amax)
    scales = scales.clamp(0, 254)
    distance = (blocks.abs() / powers[scales].unsqueeze(-1)).unsqueeze(-1).sub(values).abs()  # (..., 32, 8)
    nearest = distance == distance.amin(-1, keepdim=True)
    lower = nearest.to(torch.uint8).argmax(-1)
    upper = 7 - nearest.flip(-1).to(torch.uint8).argmax(-1)
    codes = {"zero": lower, "away": upper, "even": torch.where(lower % 2 == 0, lower, upper)}[tie_rule]
    return (codes + 8 * blocks.signbit()).to(torch.uint8).flatten(-2), scales.to(torch.uint8)


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The exact values (..., K) float64 of codes (..., K) and scale bytes (..., K/32); NaN where the byte is 255."""
    values = torch.cat((VALUES, -VALUES)).to(codes.device)[codes.long()]
    powers = torch.nn.functional.pad(SCALES, (0, 1), value=torch.nan).to(scales.device)[scales.long()]
    return values * powers.repeat_interleave(32, -1)


def pack(codes: torch.Tensor, scales: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The bytes of codes (..., K) and scales (..., K/32) in `layout`; None for scales that lie in the blocks.

    Written from each layout's description, not from mxfp4.LAYOUTS, so that a fault there shows.
    """
    if layout == "linear":  # element 2i in the low nibble of byte i, element 2i + 1 in the high one
        return codes[..., 0::2] + 16 * codes[..., 1::2], scales
    if layout == "high_first":  # element 2i in the high nibble
        return 16 * codes[..., 0::2] + codes[..., 1::2], scales
    block = codes.reshape(*codes.shape[:-1], -1, 32)
    if layout == "gguf":  # the scale, then 16 bytes with element j in the low nibble and j + 16 in the high one
        nibbles = block[..., :16] + 16 * block[..., 16:]
        return torch.cat((scales.unsqueeze(-1), nibbles), -1).flatten(-2), None
    if layout == "scale_last":  # 16 bytes as in "linear", then the scale
        nibbles = block[..., 0::2] + 16 * block[..., 1::2]
        return torch.cat((nibbles, scales.unsqueeze(-1)), -1).flatten(-2), None
    raise KeyError(layout)


def contraction(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X (..., M, K) w (..., N, K)^T and |x| |w|^T, float64 (..., M, N); all else about a GEMM is rounding."""
    x, w = x.double(), w.double()
    return x @ w.mT, x.abs() @ w.abs().mT
