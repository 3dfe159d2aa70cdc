"""Libraries that multiply by MXFP4 weights on a GPU, where they are installed, each by its own public functions.

What a library gives is held against the same reference as the kernels: one that lays weights out otherwise than its
adapter thinks shows it by its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch

from mxharness import mxfp4
from mxharness.bench.work import Rival
from mxharness.mxfp4 import Quantized

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""X (M, K) to x W^T (M, N), by a weight that is laid out already."""


def product_rivals(
    xs: Sequence[torch.Tensor], stored: tuple[Quantized, ...], copies: int
) -> tuple[dict[str, Rival], dict[str, str]]:
    """Rivals of x W^T on the first `copies` of xs and stored; those that are absent, with the reason."""
    rivals, absent = {}, {}
    for name, (module, _) in PEERS.items():
        if not _installed(module):
            absent[name] = f"{module} is not installed"
            continue
        try:
            rivals[name] = Rival(_turns(_laid_out(name, stored, xs[0].dtype), xs, copies), copies)
        except Exception as error:  # whatever somebody else's code raises
            absent[name] = f"cannot be prepared: {type(error).__name__}: {error}"
    return rivals, absent


def released() -> None:
    """Give back the weights that are laid out."""
    _laid_out.cache_clear()


@lru_cache(maxsize=8)
def _laid_out(name: str, stored: tuple[Quantized, ...], dtype: torch.dtype) -> tuple[Multiply, ...]:
    prepare = PEERS[name][1]
    return tuple(prepare(weight, dtype) for weight in stored)


def _turns(multiply: Sequence[Multiply], xs: Sequence[torch.Tensor], copies: int) -> Callable[[int], torch.Tensor]:
    return lambda i: multiply[i % copies](xs[i % copies])


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _triton_kernels(weight: Quantized, dtype: torch.dtype) -> Multiply:
    """Its layouts for this GPU; `matmul`, or `matmul_ogs` as it was called before."""
    tensor = import_module("triton_kernels.tensor")
    layout = import_module("triton_kernels.tensor_details.layout")
    name = "matmul" if find_spec("triton_kernels.matmul") else "matmul_ogs"
    product = import_module(f"triton_kernels.{name}")

    def converted(part: object, made: object) -> object:
        kind, options = made if isinstance(made, tuple) else (made, {})
        return tensor.convert_layout(part, kind, **options)

    codes = tensor.wrap_torch_tensor(weight.codes.mT, dtype=tensor.FP4)
    scales = tensor.wrap_torch_tensor(weight.scales.mT)
    w = converted(codes, layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2))
    s = converted(scales, layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2, num_warps=8))
    known = {field.name for field in fields(product.PrecisionConfig)}
    config = product.PrecisionConfig(**{"b_mx_scale" if "b_mx_scale" in known else "weight_scale": s})
    function: Callable[..., torch.Tensor] = getattr(product, name)
    return lambda x: function(x, w, None, precision_config=config)


def _gemlite(weight: Quantized, dtype: torch.dtype) -> Multiply:
    helper = import_module("gemlite.helper")
    made = helper.A16W4_MXFP(device=str(weight.codes.device), dtype=dtype)
    scales = weight.scales.view(torch.float8_e8m0fnu)
    layer: Multiply = (
        made.from_packed_weights(weight.codes, scales)
        if hasattr(made, "from_packed_weights")
        else made.from_weights(mxfp4.unpack(weight.codes), scales)  # up to 0.5.1
    )
    return layer


def _humming(weight: Quantized, dtype: torch.dtype) -> Multiply:
    N, K = weight.codes.shape[0], weight.codes.shape[1] * 2
    layer = import_module("humming.layer").HummingLayer(
        shape_n=N, shape_k=K, weight_config={"quant_method": "mxfp4"}, torch_dtype=dtype
    )
    layer.to(weight.codes.device)
    layer.load_from_tensors({"weight": weight.codes, "weight_scale": weight.scales})
    layer.transform()
    multiply: Multiply = layer
    return multiply


def _marlin(weight: Quantized, dtype: torch.dtype) -> Multiply:
    """VLLM's."""
    marlin = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils_fp4")
    N, K = weight.codes.shape[0], weight.codes.shape[1] * 2
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.codes.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(weight.scales.clone(), requires_grad=False)
    layer.output_size_per_partition, layer.input_size_per_partition = N, K  # type: ignore[assignment]  # as vLLM does
    layer.params_dtype = dtype  # type: ignore[assignment]  # as above
    marlin.prepare_fp4_layer_for_marlin(layer)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = marlin.apply_fp4_marlin_linear(
            x, layer.weight, layer.weight_scale, None, layer.workspace, size_n=N, size_k=K
        )
        return y

    return multiply


def _torchao(weight: Quantized, dtype: torch.dtype) -> Multiply:
    """Its emulation: decoded for every call, then torch's product."""
    to_dtype = import_module("torchao.prototype.mx_formats.mx_tensor").to_dtype
    codes, scales = weight.codes, weight.scales.view(torch.float8_e8m0fnu)
    four_bits = torch.float4_e2m1fn_x2
    return lambda x: torch.nn.functional.linear(x, to_dtype(codes, scales, four_bits, mxfp4.BLOCK, dtype))


PEERS: dict[str, tuple[str, Callable[[Quantized, torch.dtype], Multiply]]] = {
    "triton_kernels": ("triton_kernels", _triton_kernels),
    "gemlite": ("gemlite", _gemlite),
    "humming": ("humming", _humming),
    "marlin": ("vllm", _marlin),
    "torchao": ("torchao", _torchao),
}
"""By the name in a table, the module to import and what lays out a weight."""
