"""Replace a model's linear layers by modules that hold MXFP4, and see what it costs.

Usage: python examples/quantise_a_model.py
"""

from __future__ import annotations

import torch
from mxharness.nn import quantize_model


def main() -> None:
    """Print what was replaced and the error of the model's output."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    x = torch.randn(8, 256, generator=generator)
    with torch.inference_mode():
        before = model(x)
        print(quantize_model(model))
        after = model(x)
    error = float((after - before).norm() / before.norm())
    print(f"{error:.3f} relative error of the output")


if __name__ == "__main__":
    main()
