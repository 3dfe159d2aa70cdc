"""Quantise a tensor to MXFP4, decode it again, and move it between packings.

Usage: python examples/quantise_a_tensor.py
"""

from __future__ import annotations

import torch
from mxharness import mxfp4


def main() -> None:
    """Print the error of each scale rule on normal data, and the bytes of one block in each packing."""
    weights = torch.randn(64, 2880, generator=torch.Generator().manual_seed(0))
    for rule in mxfp4.SCALE_RULES:
        codes, scales = mxfp4.quantize(weights, scale_rule=rule)
        decoded = mxfp4.dequantize(codes, scales, torch.float32)
        error = float((decoded - weights).square().mean().sqrt())
        print(f"{rule:6} {error:.4f} root mean square error")
    block = mxfp4.quantize(weights[:1, :32])
    for layout in mxfp4.LAYOUTS:
        packed = mxfp4.to_layout(block, layout)
        print(f"{layout:10} {bytes(packed.data.flatten()[:6].tolist()).hex(' ')} ...")


if __name__ == "__main__":
    main()
