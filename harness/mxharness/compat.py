"""Names by which other MXFP4 libraries call the same things, so that their examples run; the work is done elsewhere.

Sources: MoizMXFP4 (MXLinear, quant_matmul, MXFP4Quantizer, quantize_model_mxfp4, print_architecture_info) and the MXFP4
tests of gpt-oss (benchmark_linear_layers, test_quantization_accuracy). What they promise and MXFP4 does not have (other
block sizes, scale formats) is a UserError that says what exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch

from mxharness import mxfp4
from mxharness.device import open_device
from mxharness.errors import Unavailable, UserError
from mxharness.functional.common import check_pair, check_tensor, integer
from mxharness.mxfp4 import BLOCK, Quantized
from mxharness.nn import MXFP4Linear, QuantizationReport, quantize_model
from mxharness.nn.packed import check_place, check_sizes
from mxharness.timing import elapsed

MXLinear = MXFP4Linear


@dataclass(frozen=True)
class MXFP4Quantizer:
    """`mxfp4.quantize` and `mxfp4.dequantize` as an object."""

    block_size: int = BLOCK
    scale_format: str = "e8m0"
    scale_rule: str = "floor"
    tie_rule: str = "even"

    def __post_init__(self) -> None:
        _check_format(self.block_size, self.scale_format)

    def quantize(self, tensor: torch.Tensor) -> Quantized:
        """Codes (.., Kp/2) and scales (.., Kp/32), uint8, of a tensor (.., K)."""
        check_tensor(tensor, "tensor")
        if tensor.is_meta:
            raise UserError("a tensor on the meta device has no values to quantise")
        return mxfp4.quantize(tensor, self.scale_rule, self.tie_rule)

    def dequantize(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Values of the `shape` (.., K) that was quantised, or without it (.., Kp). UserError where it does not fit."""
        values = mxfp4.dequantize(*check_pair(Quantized(packed, scales)), dtype)
        if shape is None:
            return values
        if not isinstance(shape, Sequence) or any(integer(size, "a size of shape") < 0 for size in shape):
            raise UserError(f"shape must be sizes (.., K), not {shape!r}")
        padded = (*shape[:-1], -(-shape[-1] // BLOCK) * BLOCK) if shape else ()
        if prod(padded) != values.numel() or not shape:
            raise UserError(f"codes of {tuple(values.shape)} values are not those of a tensor {tuple(shape)}")
        return values.view(padded)[..., : shape[-1]]


def quant_matmul(activations: torch.Tensor, packed_weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Y (.., N) = activations (.., K) W^T for codes (N, Kp/2) and scales (N, Kp/32): `MXFP4Linear` without a bias."""
    weight = Quantized(packed_weight, scales)
    check_tensor(activations, "activations")
    layer = MXFP4Linear.from_quantized(weight, in_features=activations.shape[-1] if activations.ndim else 0)
    return layer.forward(activations)


def quantize_model_mxfp4(
    model: torch.nn.Module,
    block_size: int = BLOCK,
    **options: Any,  # noqa: ANN401  those of quantize_model
) -> QuantizationReport:
    """`nn.quantize_model`; UserError for a block size other than 32."""
    _check_format(block_size, "e8m0")
    return quantize_model(model, **options)


def print_architecture_info() -> None:
    """Print which device runs the kernels, and with what arithmetic."""
    try:
        device = open_device()
    except Unavailable as reason:
        print(f"Kernels:     cannot run: {reason}")
        return
    gpu = device.torch_device.type == "cuda"
    name = torch.cuda.get_device_name(device.torch_device) if gpu else "this CPU (the kernels, compiled for the host)"
    print(f"Device:      {name}")
    print(f"Class:       {device.device_class}")
    print(
        f"Arithmetic:  {device.arithmetic}: bfloat16 or float16 activations, float32 sums, weights decoded on the fly"
    )


def benchmark_linear_layers(
    input_size: int = 2880,
    hidden_size: int = 2880,
    output_size: int = 2880,
    batch_size: int = 16,
    num_iterations: int = 100,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """Median seconds of two linear layers in a row, input -> hidden -> output, with 16-bit and with MXFP4 weights.

    Returns standard_seconds, mxfp4_seconds, speedup (their ratio), standard_bytes and mxfp4_bytes of the weights and
    biases. Each call is launched and timed alone, as a user meets it; `functional.gemm_profile` times the kernel.
    """
    if integer(num_iterations, "num_iterations") < 1:
        raise UserError(f"num_iterations must be at least 1, not {num_iterations}")
    standard, quantised, x = _two_layers(input_size, hidden_size, output_size, batch_size, device, dtype)
    times = {}
    with torch.no_grad():
        for name, model in (("standard", standard), ("mxfp4", quantised)):
            model(x)  # loads kernels
            times[name] = median(elapsed(partial(model, x), x.device) for _ in range(num_iterations))
    return {
        "standard_seconds": times["standard"],
        "mxfp4_seconds": times["mxfp4"],
        "speedup": times["standard"] / times["mxfp4"],
        "standard_bytes": sum(tensor.nbytes for tensor in standard.parameters()),
        "mxfp4_bytes": sum(tensor.nbytes for tensor in quantised.buffers()),
    }


def quantization_accuracy(
    input_size: int = 2880,
    hidden_size: int = 2880,
    output_size: int = 2880,
    batch_size: int = 16,
    num_tests: int = 20,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """Relative errors (Frobenius norm) of one quantised layer after another, on random weights and activations.

    Two budgets that must not be mixed: kernel_error is the layer against float64 on its decoded weights, which is
    rounding; quantization_error is the decoded weights against the original ones, both in float64, which is MXFP4's
    own 11 to 13 % whatever the kernel does. Returns mean and max of both over num_tests random layers.
    """
    if integer(num_tests, "num_tests") < 1:
        raise UserError(f"num_tests must be at least 1, not {num_tests}")
    found: dict[str, list[float]] = {"kernel_error": [], "quantization_error": []}
    for _ in range(num_tests):
        standard, quantised, x = _two_layers(input_size, hidden_size, output_size, batch_size, device, dtype)
        for plain, packed in zip(standard, quantised, strict=True):
            with torch.no_grad():
                y = packed(x)
            assert isinstance(plain, torch.nn.Linear) and isinstance(packed, MXFP4Linear)  # noqa: S101, PT018  by make
            original = _product(x, plain.weight, plain.bias)
            decoded = _product(x, mxfp4.dequantize(*packed.packed)[:, : packed.in_features], plain.bias)
            found["kernel_error"].append(float((y.double() - decoded).norm() / decoded.norm()))
            found["quantization_error"].append(float((decoded - original).norm() / original.norm()))
            x = y
    mean = {f"{name}_mean": sum(errors) / len(errors) for name, errors in found.items()}
    return mean | {f"{name}_max": max(errors) for name, errors in found.items()}


setattr(quantization_accuracy, "__test__", False)  # noqa: B010  pytest shall not collect it; mypy knows no such name
test_quantization_accuracy = quantization_accuracy


def _two_layers(
    inputs: int, hidden: int, outputs: int, batch: int, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[torch.nn.Sequential, torch.nn.Sequential, torch.Tensor]:
    """Two linear layers, the same in MXFP4, and an input, on `device` (default: where the kernels run)."""
    check_sizes(input_size=inputs, hidden_size=hidden, output_size=outputs, batch_size=batch)
    check_place(device, dtype)
    where = open_device().torch_device if device is None else torch.device(device)
    layers = [torch.nn.Linear(*sizes, device=where, dtype=dtype) for sizes in ((inputs, hidden), (hidden, outputs))]
    quantised = [MXFP4Linear.from_linear(layer) for layer in layers]
    x = torch.randn(batch, inputs, device=where).to(dtype)
    return torch.nn.Sequential(*layers), torch.nn.Sequential(*quantised), x


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.detach().double() @ weight.detach().double().T + bias.detach().double()


def _check_format(block_size: int, scale_format: str) -> None:
    if block_size != BLOCK:
        raise UserError(f"MXFP4 has blocks of {BLOCK} elements (OCP MX 1.0), not {block_size}")
    if scale_format != "e8m0":
        raise UserError(f"MXFP4 has e8m0 scales (OCP MX 1.0), not '{scale_format}'")
