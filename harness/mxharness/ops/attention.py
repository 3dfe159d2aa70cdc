"""Attention: projections with MXFP4 weights, softmax(scale q K^T) V over a KV cache, and the whole block.

The projections are contractions (ops/gemm.py), rotation and cache are judged as in ops/kv_cache.py, the core, against
the kernel's own rotated queries and cache, by the bound that ops/attention_reference.py derives and in the bits that
ops/attention_bits.py predicts. Whatever lies in a cache past a sequence's length is NaN in these cases, so that a key
too many shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from mxharness import functional, mxfp4, regimes, tensor_core
from mxharness import golden as reference
from mxharness.bounds import Bounded, contraction, exact, gamma, quantum, rounded
from mxharness.device import Device
from mxharness.functional.attention import stages
from mxharness.op import ONE_STAGE, Case, Expected, Op, Tensors, Tolerance
from mxharness.ops import kv_cache
from mxharness.ops.attention_bits import core_bits
from mxharness.ops.attention_cases import (
    BLOCKS,
    CORE,
    N_OUT,
    OUTPUT,
    PROJECTIONS,
    QKV,
    fuzz,
    make_inputs,
)
from mxharness.ops.attention_places import operands, where
from mxharness.ops.attention_reference import core, core_arguments, heads_of, rule, stored_as_mxfp4
from mxharness.ops.gemm import linear, linear_bits
from mxharness.ops.kv_cache_reference import appended, placed, rotate, rotated, rotated_bits


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """One reference a stage: projections, rotation, cache, heads, output."""
    x, dtype = tensors["x" if "x" in tensors else "q"], regimes.DTYPES[case.dtype]
    projected = {name: linear(x, *weight, dtype) for name, weight in projections(case, tensors).items()}
    if case.op in ("qkv_projection", "fused_qkv_projection"):
        return projected
    if case.op == "attention_output_projection":
        return {"y": linear(x.flatten(2), tensors["codes"], tensors["scales"], tensors.get("bias"), dtype)}
    queries, k, v, seen = core_arguments(case, tensors)
    y = core(exact(queries), exact(k), exact(v), seen, dtype)
    if case.regime == "integers" and seen.window:  # so many equal keys, a power of two: the mean of their values
        step = quantum(v[v.isfinite()]) / seen.window
        y = replace(y, quantum=step.expand_as(y.value))
    if case.op == "attention":
        return {"y": y}
    q, new_k, new_v = (heads_of(tensors[name], case.shape[5]) for name in PROJECTIONS)
    found = {
        **projected,
        **appended(case, tensors, new_k, new_v, _past(case, tensors)),
        "heads": y,
        "y": linear(tensors["heads"].flatten(2), tensors["codes"], tensors["scales"], tensors.get("bias"), dtype),
    }
    return {**found, "rotated": rotated(case, q, tensors)} if "rotated" in tensors else found


def _past(case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The cache before the block ran: the past of every sequence, then zeros."""
    before = {name: torch.zeros_like(tensors[name]) for name in tensors if "_cache" in name}
    if "past_k" not in tensors:
        return before
    earlier = {"positions": torch.zeros_like(tensors["positions"])}  # and no angles: rotated already
    found = appended(case, earlier, tensors["past_k"], tensors["past_v"], before)
    return {name: want.value for name, want in found.items()}


def projections(case: Case, tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Codes, scales and bias of each of the three weights; none where the function has none."""
    if "qkv_codes" not in tensors:
        names = [name for name in PROJECTIONS if f"{name}_codes" in tensors]
        return {n: (tensors[f"{n}_codes"], tensors[f"{n}_scales"], tensors.get(f"{n}_bias")) for n in names}
    if case.op == "fused_qkv_projection":
        _, _, H, Hkv, D = case.shape
    else:
        Hkv, G, D = case.shape[3:6]
        H = Hkv * G
    ends, found = (0, H * D, (H + Hkv) * D, (H + 2 * Hkv) * D), {}
    for i, name in enumerate(PROJECTIONS):
        here, bias = slice(ends[i], ends[i + 1]), tensors.get("qkv_bias")
        found[name] = (
            tensors["qkv_codes"][here],
            tensors["qkv_scales"][here],
            bias if bias is None else bias[here],
        )
    return found


def predict(case: Case, tensors: Tensors) -> Tensors:
    """The core, projections and the output in bits; a block's rotation as well."""
    dtype = regimes.DTYPES[case.dtype]
    if case.op == "attention":
        return {"y": core_bits(*core_arguments(case, tensors), dtype)}
    x = tensors["x"]

    def bits(rows: torch.Tensor, *weight: torch.Tensor | None) -> torch.Tensor:
        codes, scales, bias = weight
        if codes is None or scales is None:
            raise ValueError(f"{case} has no weight")
        flat = linear_bits(rows.reshape(-1, rows.shape[-1]), codes, scales, bias, dtype)
        return flat.reshape(*rows.shape[:-1], -1)

    few = x.shape[0] < 256  # the model is slow, and the rows of a large batch are like those of a small one
    found = {name: bits(x, *weight) for name, weight in projections(case, tensors).items() if few}
    if case.op.endswith("qkv_projection"):
        return found
    found["y"] = bits(tensors.get("heads", x).flatten(2), tensors["codes"], tensors["scales"], tensors.get("bias"))
    if case.op != "attention_output_projection":
        found["heads"] = core_bits(*core_arguments(case, tensors), dtype)
    if "rotated" in tensors:
        found["rotated"] = rotated_bits(case, heads_of(tensors["q"], case.shape[5]), tensors)
    return found


def composed(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Y of a block from its inputs alone, every rounding of the stages before carried along."""
    _, T, _, Hkv, _, D, P = case.shape
    B, dtype = inputs["x"].shape[0], regimes.DTYPES[case.dtype]
    rows: dict[str, Bounded] = {}
    for name, weight in projections(case, inputs).items():
        whole = rounded(as_bounded(linear(inputs["x"], *weight, dtype)), dtype)
        rows[name] = Bounded(heads_of(whole.value, D), heads_of(whole.error, D))
        if name != "v" and "angles" in inputs:
            rows[name] = _turned(case, inputs, rows[name], dtype)
    held = {}
    for name in "kv":
        before = torch.zeros(B, Hkv, T + P, D, dtype=torch.float64, device=rows[name].value.device)
        error = placed(rows[name].error, inputs["positions"], before)
        if P:
            before[:, :, :P] = inputs[f"past_{name}"].double().transpose(1, 2)
        held[name] = Bounded(placed(rows[name].value, inputs["positions"], before), error)
        if case.option("cache") == "mxfp4":
            held[name] = stored_as_mxfp4(held[name])
    seen = rule(case, inputs, inputs["positions"] + case.shape[1])
    heads = rounded(as_bounded(core(rows["q"], held["k"], held["v"], seen, dtype)), dtype)
    weights = reference.decode(mxfp4.unpack(inputs["codes"]), inputs["scales"])
    flat = Bounded(heads.value.flatten(2), heads.error.flatten(2))
    chunk, K = tensor_core.CHUNK[case.dtype], weights.shape[-1]
    y = contraction(flat, weights, min(chunk, K) + -(-K // chunk))
    bias = inputs["bias"].double() if "bias" in inputs else torch.zeros(N_OUT, device=y.value.device)
    return {"y": Expected(y.value + bias, y.value.abs() + y.error + bias.abs(), 1, dtype, y.error)}


def as_bounded(stage: Expected) -> Bounded:
    """A stage's value and all that its own roundings may do to it but the last."""
    error = torch.zeros_like(stage.value)
    if stage.magnitude is not None:
        error = error + gamma(stage.chain) * stage.magnitude
    return Bounded(stage.value, error if stage.slack is None else error + stage.slack)


def _turned(case: Case, inputs: Tensors, rows: Bounded, dtype: torch.dtype) -> Bounded:
    """Rotated: the errors of a pair add up with |cos| and |sin|, as the sizes of its terms do."""
    table, order = inputs["angles"].double(), case.option("rope")
    own = as_bounded(rotate(rows.value, table, inputs["positions"], order))
    carried = rotate(rows.error, table, inputs["positions"], order).magnitude
    error = own.error if carried is None else own.error + (1 + gamma(2)) * carried
    return rounded(Bounded(own.value, error), dtype)


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name; of a block, all its stages and the cache it leaves."""
    if "_projection" in case.op:
        return _launch_projection(device, case, inputs)
    window, scale = case.option("window"), case.option("scale")
    if case.op == "attention":
        q, S = inputs["q"], case.shape[5]
        cache = kv_cache.cache_of(case, inputs, S, q.shape[3], q.shape[0])
        y = functional.attention(
            q, cache, inputs["lengths"], scale=float(scale) if scale else None, causal="full" not in case.options,
            window=int(window) if window else None, sinks=inputs.get("sinks"), device=device,
        )  # fmt: skip
        return {"y": y}
    _, T, _, Hkv, _, D, P = case.shape
    cache = kv_cache.empty_cache(device, case, inputs, inputs["x"].shape[0], Hkv, T + P, D)
    positions = inputs["positions"]
    if P:
        start = torch.zeros_like(positions)
        functional.kv_cache_append(cache, inputs["past_k"], inputs["past_v"], start, device=device)
    weight, bias = _weights(inputs)
    found = stages(
        inputs["x"], weight, mxfp4.Quantized(inputs["codes"], inputs["scales"]), cache, positions, bias=bias,
        output_bias=inputs.get("bias"), rope=kv_cache.rope_of(case, inputs), scale=None,
        window=int(window) if window else None, sinks=inputs.get("sinks"), device=device,
    )  # fmt: skip
    found |= {name: found[name].flatten(2) for name in PROJECTIONS}
    if "angles" not in inputs:  # then the rotated queries are the queries
        del found["rotated"]
    return {**found, **kv_cache.contents(device, cache, inputs.get("table"))}


def _launch_projection(device: Device, case: Case, inputs: Tensors) -> Tensors:
    x = inputs["x"]
    if case.op == "attention_output_projection":
        weight = mxfp4.Quantized(inputs["codes"], inputs["scales"])
        return {"y": functional.attention_output_projection(x, weight, bias=inputs.get("bias"), device=device)}
    weights, bias = _weights(inputs)
    if isinstance(weights, functional.Projections):
        three = bias if isinstance(bias, functional.QKV) else None
        return functional.qkv_projection(x, *weights, bias=three, device=device)._asdict()
    one = bias if isinstance(bias, torch.Tensor) else None
    H, Hkv, D = case.shape[2:]
    return functional.fused_qkv_projection(x, weights, H, Hkv, D, bias=one, device=device)._asdict()


def _weights(
    inputs: Tensors,
) -> tuple[mxfp4.Quantized | functional.Projections, functional.QKV | torch.Tensor | None]:
    """One fused weight and bias, or three."""
    if "qkv_codes" in inputs:
        return mxfp4.Quantized(inputs["qkv_codes"], inputs["qkv_scales"]), inputs.get("qkv_bias")
    weights = [mxfp4.Quantized(inputs[f"{name}_codes"], inputs[f"{name}_scales"]) for name in PROJECTIONS]
    bias = [inputs[f"{name}_bias"] for name in PROJECTIONS if f"{name}_bias" in inputs]
    return functional.Projections(*weights), functional.QKV(*bias) if bias else None


# The whole function's ceiling is high because an output sums H D products whose worst errors all add up, while the
# products themselves half cancel: the bound grows with H D, the result with its root. Cases keep H D small.
TOLERANCE = Tolerance(
    why="chains on the tensor core, exponents rounded to 2^-12, weights to 16 bits, chunks joined in float32",
    unit_roundoff=2.0**-24,
    source="gamma_n for contractions (docs/tensor_core.md); first-order softmax in ops/attention_reference.py",
    ceiling=0.2,
    composed_ceiling=0.5,
)


def _op(name: str, cases: tuple[Case, ...], axes: str, rows: tuple[str, ...]) -> Op:
    return Op(
        name=name,
        source="attention.cu",
        axes=axes,
        cases=tuple(case for case in cases if case.op == name),
        make_inputs=make_inputs,
        golden=golden,
        launch=launch,
        tolerance=TOLERANCE,
        fuzz=partial(fuzz, name),
        predict=predict,
        without={} if axes == _BLOCK_AXES else ONE_STAGE,
        composed=composed if axes == _BLOCK_AXES else None,
        places=where,
        operands=None if name == "attention" else operands,
        row_axis=axes[0],
        row_inputs=rows,
    )


_BLOCK_AXES, _BLOCK_ROWS = "B T K Hkv G D P", ("x", "positions", "past_k", "past_v", "table")
OPS = (
    _op("qkv_projection", QKV, "M K H Hkv D", ("x",)),
    _op("fused_qkv_projection", QKV, "M K H Hkv D", ("x",)),
    _op("attention_output_projection", OUTPUT, "B T N H D", ("x",)),
    _op("attention", CORE, "B T H Hkv D S", ("q", "lengths", "table", "k", "v", "k_scales", "v_scales")),
    _op("multi_head_attention", BLOCKS, _BLOCK_AXES, _BLOCK_ROWS),
    _op("grouped_query_attention", BLOCKS, _BLOCK_AXES, _BLOCK_ROWS),
)
