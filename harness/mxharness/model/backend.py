"""With which weights and which arithmetic a model's linear layers and embedding run.

Three backends, one model: float32 torch on the original weights, float32 torch on the weights that MXFP4 decodes to,
and the project's kernels on the MXFP4 bytes. The second is the reference of the third: same weights, no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch

    from mxharness.device import Device
    from mxharness.mxfp4 import Quantized

W = TypeVar("W")
Activations = Literal["fp16", "bf16"]
ACTIVATIONS = ("fp16", "bf16")


@dataclass(frozen=True)
class Backend(Generic[W]):
    """Functions over a weight handle W, and the words that say what a number was computed with."""

    name: str
    """"float32", "decoded" or "kernels"."""
    weights: str
    """"float32" or "mxfp4 (floor, even)": scale rule, tie rule."""
    activations: str
    """Dtype of the activations a linear layer multiplies: fp32, fp16 or bf16."""
    arithmetic: str
    """"torch float32", or the device's "tensor-core" or "float32"."""
    device_class: str
    """"cpu" or "sm_90" for torch, "host" or "sm_90" for the kernels."""
    torch_device: torch.device
    prepare: Callable[[torch.Tensor], W]
    """(N, K) float32 on the CPU -> handle on the device."""
    linear: Callable[[torch.Tensor, W], torch.Tensor]
    """x (M, K) float32, w (N, K) -> x w^T (M, N) float32."""
    embedding: Callable[[torch.Tensor, W], torch.Tensor]
    """ids (M,) int64, w (N, K) -> rows (M, K) float32."""


def float32(torch_device: torch.device | None = None) -> Backend[torch.Tensor]:
    """The original weights in float32 torch."""
    return _torch_backend("float32", "float32", torch_device, lambda weight: weight)


def decoded(
    torch_device: torch.device | None = None, scale_rule: str = "floor", tie_rule: str = "even"
) -> Backend[torch.Tensor]:
    """Float32 torch on the weights that MXFP4 decodes to, rounded along the input dimension."""
    from mxharness import mxfp4

    def prepare(weight: torch.Tensor) -> torch.Tensor:
        return mxfp4.dequantize(*mxfp4.quantize(weight, scale_rule, tie_rule))

    return _torch_backend("decoded", f"mxfp4 ({scale_rule}, {tie_rule})", torch_device, prepare)


def kernels(
    device: Device, activations: Activations = "fp16", scale_rule: str = "floor", tie_rule: str = "even"
) -> Backend[Quantized]:
    """The MXFP4 bytes through the project's kernels on `device`.

    A linear layer rounds its input to `activations` and keeps the float32 accumulator; the embedding gathers packed
    rows and decodes them to float32.
    """
    import torch

    from mxharness import functional, mxfp4

    if activations not in ACTIVATIONS:
        raise UserError(f"no activations '{activations}'; there are {', '.join(ACTIVATIONS)}")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[activations]

    def prepare(weight: torch.Tensor) -> Quantized:
        codes, scales = mxfp4.quantize(weight, scale_rule, tie_rule)
        return mxfp4.Quantized(device.upload(codes), device.upload(scales))

    def linear(x: torch.Tensor, weight: Quantized) -> torch.Tensor:
        return functional.gemm(x.to(dtype), weight, out_dtype=torch.float32, device=device)

    def embedding(ids: torch.Tensor, weight: Quantized) -> torch.Tensor:
        return functional.dequantize(mxfp4.Quantized(weight.codes[ids], weight.scales[ids]), device=device)

    return Backend(
        name="kernels",
        weights=f"mxfp4 ({scale_rule}, {tie_rule})",
        activations=activations,
        arithmetic=device.arithmetic,
        device_class=device.device_class,
        torch_device=device.torch_device,
        prepare=prepare,
        linear=linear,
        embedding=embedding,
    )


def _torch_backend(
    name: str, weights: str, torch_device: torch.device | None, round_trip: Callable[[torch.Tensor], torch.Tensor]
) -> Backend[torch.Tensor]:
    import torch

    if torch.get_float32_matmul_precision() != "highest":
        raise UserError("torch multiplies float32 with reduced precision; call set_float32_matmul_precision('highest')")
    where = torch_device or torch.device("cpu")
    device_class = "cpu"
    if where.type == "cuda":
        device_class = "sm_{}{}".format(*torch.cuda.get_device_capability(where))
    return Backend(
        name=name,
        weights=weights,
        activations="fp32",
        arithmetic="torch float32",
        device_class=device_class,
        torch_device=where,
        prepare=lambda weight: round_trip(weight).to(where),
        linear=torch.nn.functional.linear,
        embedding=lambda ids, weight: weight[ids],
    )
