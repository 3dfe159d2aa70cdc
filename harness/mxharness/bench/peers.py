"""Libraries that multiply by MXFP4 weights on a GPU, where they are installed, each by its own public functions.

What a library gives is held against the same reference as the kernels: one that lays weights out otherwise than its
adapter thinks shows it by its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch

from mxharness import mxfp4
from mxharness.bench.work import Rival
from mxharness.mxfp4 import Quantized

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""X (M, K) to x W^T (M, N), by a weight that is laid out already."""


@dataclass(frozen=True)
class MoeLayer:
    """E experts of gpt-oss's kind: gates and ups of SwiGLU alternate in `up`; biases float32."""

    router: torch.Tensor
    """(E, H), of x's dtype."""
    router_bias: torch.Tensor
    up: Quantized
    """(E, 2 I, H)."""
    up_bias: torch.Tensor
    down: Quantized
    """(E, H, I)."""
    down_bias: torch.Tensor


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
            absent[name] = f"cannot be prepared: {first_line(error)}"
    return rivals, absent


def first_line(error: Exception) -> str:
    """What went wrong, in one line: a compiler's error brings pages."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
    function, w, config = _triton_weight(weight)
    return lambda x: function(x, w, None, precision_config=config)


def _triton_weight(weight: Quantized) -> tuple[Callable[..., torch.Tensor], object, object]:
    """Its product, and a weight (.., N, K) as that wants it."""
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
    return function, w, config


def moe_rival(xs: Sequence[torch.Tensor], layer: MoeLayer, k: int) -> tuple[dict[str, Rival], dict[str, str]]:
    """Triton_kernels' MoE of gpt-oss's kind on xs, or why there is none."""
    name = "triton_kernels"
    if not (_installed(name) and _installed(f"{name}.matmul")):
        return {}, {name: "triton_kernels with ragged products is not installed"}
    try:
        forward = _triton_moe(layer, k)
        forward(xs[0])
    except Exception as error:  # whatever somebody else's code raises
        return {}, {name: f"cannot be prepared: {first_line(error)}"}
    return {name: Rival(lambda i: forward(xs[i % len(xs)]), len(xs))}, {}


def _triton_moe(layer: MoeLayer, k: int) -> Multiply:
    """Router, rows gathered by expert, SwiGLU in the first product, rows scattered by the second, their sum."""
    product, tensor = import_module("triton_kernels.matmul"), import_module("triton_kernels.tensor")
    topk, swiglu = import_module("triton_kernels.topk").topk, import_module("triton_kernels.swiglu").swiglu_fn
    (matmul, up, up_config), (_, down, down_config) = _triton_weight(layer.up), _triton_weight(layer.down)
    kind = product.FnSpecs("swiglu", swiglu, ("alpha", "limit"), reduction_n=2)
    activation = product.FusedActivation(kind, (1.702, 7.0))
    router = layer.router.T.contiguous()

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = torch.addmm(layer.router_bias.to(x.dtype), x, router)
        chosen = topk(logits, k, apply_softmax=True)
        order = chosen.mask_metadata.col_sorted_indx
        groups = tensor.make_ragged_tensor_metadata(chosen.mask_metadata.col_sum, order.shape[0])
        h = matmul(
            x, up, layer.up_bias, a_ragged_metadata=groups, gather_indx=order // k, precision_config=up_config,
            fused_activation=activation,
        )  # fmt: skip
        y = matmul(
            h, down, layer.down_bias, a_ragged_metadata=groups, scatter_indx=order, precision_config=down_config,
            gammas=chosen.vals.flatten()[order],
        )  # fmt: skip
        return y.view(len(x), k, -1).sum(1)

    return forward


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
