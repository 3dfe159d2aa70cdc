"""From a launch inside a model to the operator that judges it: its case, its inputs as they were, its outputs.

A launch is read by the names of its kernel's parameters. What has an operator of its own is judged by that; a stage of
a larger function (an activation, a router's choice, experts' rows) by that function's reference of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from mxharness import functional, regimes
from mxharness.errors import UserError
from mxharness.functional.gemm import SWIGLU
from mxharness.op import Case, Expected, Op, Tensors
from mxharness.ops import activation_bits, activations, find
from mxharness.ops.kv_cache_reference import appended, placed, rotated_bits
from mxharness.ops.moe_reference import gated, gated_bits, joined, routed
from mxharness.ops.norm import added, added_bits, norm
from mxharness.watched import Launch


@dataclass(frozen=True)
class Judgeable:
    """What the judge takes, of a launch or of a part of it."""

    op: Op
    case: Case
    inputs: Tensors
    outputs: Tensors
    part: str = ""
    """ "expert 3"."""
    rows: tuple[int, int] = (0, 0)
    """How many rows are judged, and how many there are; (0, 0) where all are."""
    work: int = 0
    """Products of what cannot be judged by rows."""

    @property
    def whole(self) -> bool:
        """Whether the operator on these inputs launches what was launched, so that a fault can be sought along K."""
        return not self.part and self.rows[0] == self.rows[1]


def judgeables(launch: Launch, products: int) -> list[Judgeable]:
    """What is to be judged of a launch. products: of a contraction; so many rows of it, evenly spaced, are taken.

    Raises UserError for a kernel that has no reference here.
    """
    for prefix, read in _READERS.items():
        if launch.kernel.startswith(prefix):
            return read(launch, products)
    raise UserError(f"kernel {launch.kernel} has no reference inside a model; there are {', '.join(_READERS)}")


def leads_astray(launch: Launch) -> bool:
    """Whether a launch left indices by which later kernels would read or write outside their tensors."""
    if launch.kernel.startswith("moe_route"):
        ids = launch.left["ids"]
        return bool(((ids < 0) | (ids >= launch.number("E"))).any())
    if launch.kernel.startswith("moe_group"):
        offsets, entries = launch.left["offsets"], launch.left["entries"]
        each_once = torch.equal(entries.sort().values, torch.arange(len(entries), dtype=entries.dtype))
        return not (each_once and offsets[0] == 0 and offsets[-1] == len(entries) and (offsets.diff() >= 0).all())
    return False


def _dtype(x: torch.Tensor) -> str:
    return next(name for name, dtype in regimes.DTYPES.items() if dtype == x.dtype)


def _some(rows: int, each: int, products: int) -> torch.Tensor:
    """Evenly spaced rows, the first and the last among them, at least two where there are as many."""
    count = min(rows, max(products // max(each, 1), 2))
    return torch.linspace(0, rows - 1, count).round().long()


def _gemm(launch: Launch, products: int) -> list[Judgeable]:
    x, y = launch.tensor("x"), launch.left["y"]
    if launch.given["offsets"] is not None:
        return _experts(launch, products)
    taken = _some(len(y), y.shape[1] * x.shape[1], products)
    weight = launch.tensors("codes", "scales", "w", "bias")
    return [_product(x[taken], weight, y[taken], "", (len(taken), len(y)))]


def _experts(launch: Launch, products: int) -> list[Judgeable]:
    """Every expert's rows, as a GEMM of its own; entries say whose they are."""
    x, y = launch.tensor("x").flatten(0, -2), launch.left["y"].flatten(0, -2)
    offsets, entries = launch.tensor("offsets").tolist(), launch.tensor("entries").long()
    fan = int(launch.number("fan"))
    product = _product if launch.number("form") != SWIGLU else partial(_gated_product, launch)
    found = []
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        mine = entries[start:stop]
        mine = mine[(mine >= 0) & (mine < len(y))]  # what is wrong in them is the group's fault, and said there
        if len(mine):
            taken = mine[_some(len(mine), y.shape[1] * x.shape[1], products)]
            weight = {name: tensor[expert] for name, tensor in launch.tensors("codes", "scales", "bias").items()}
            found.append(product(x[taken // fan], weight, y[taken], f"expert {expert}", (len(taken), len(mine))))
    return found


def _product(x: torch.Tensor, weight: Tensors, y: torch.Tensor, part: str, rows: tuple[int, int]) -> Judgeable:
    name = "dense" if "w" in weight else "gemm_bias" if "bias" in weight else "gemm"
    with_bias = ("bias",) if name == "dense" and "bias" in weight else ()
    options = (*with_bias, *(("fp32",) if y.dtype == torch.float32 else ()))
    case = Case(name, (*y.shape, x.shape[1]), dtype=_dtype(x), options=options)
    return Judgeable(find(name), case, {"x": x, **weight}, {"y": y}, part, rows)


def _gated_product(
    launch: Launch, x: torch.Tensor, weight: Tensors, y: torch.Tensor, part: str, rows: tuple[int, int]
) -> Judgeable:
    """The SwiGLU of a product, made by the product's own kernel: under the bound of a whole function."""
    function, bits = _limited(launch)
    stage = _stage(
        "moe_forward", "gated", (*y.shape, x.shape[1]), {"x": x, **weight}, {"y": y},
        lambda tensors: {"y": gated(function, tensors)}, lambda tensors: {"y": gated_bits(bits, tensors)},
    )  # fmt: skip
    whole = replace(stage.op.tolerance, ceiling=stage.op.tolerance.composed_ceiling)
    return replace(stage, op=replace(stage.op, tolerance=whole), part=part, rows=rows)


def _limited(launch: Launch) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """gpt-oss's SwiGLU with a launch's alpha and limit: its reference, and its bits."""
    alpha, limit = launch.number("alpha"), launch.number("limit")
    bits = partial(activation_bits.swiglu_limited, alpha=alpha, limit=limit)
    return partial(activations.swiglu_limited, alpha=alpha, limit=limit), bits


def _norm(launch: Launch, products: int) -> list[Judgeable]:
    x, eps = launch.tensor("x"), launch.number("eps")

    def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
        y = norm("rms", tensors.get("sum", tensors["x"]), tensors["norm_weight"], None, eps)
        return {"y": y, **({"sum": added(tensors["x"], tensors["residual"], x.dtype)} if "sum" in tensors else {})}

    def predict(case: Case, tensors: Tensors) -> Tensors:
        y = activation_bits.normed("rms", tensors.get("sum", tensors["x"]), tensors["norm_weight"], None, eps)
        return {"y": y, **({"sum": added_bits(tensors["x"], tensors["residual"], x.dtype)} if "sum" in tensors else {})}

    op = replace(find("rms_norm"), golden=golden, predict=predict)
    outputs = {name: launch.left[name] for name in ("sum", "y") if name in launch.left}
    case = Case("rms_norm", tuple(x.shape), dtype=_dtype(x), options=("residual",) if "sum" in outputs else ())
    inputs = {**launch.tensors("x", "residual"), "norm_weight": launch.tensor("weight")}
    return [Judgeable(op, case, inputs, outputs)]


def _embedding(launch: Launch, products: int) -> list[Judgeable]:
    """Against the rows that the ids name; a table of a whole vocabulary need not be decoded."""
    ids, y = launch.tensor("ids"), launch.left["y"]
    used, places = torch.unique(ids, return_inverse=True)
    inputs = {name: tensor[used.long()] for name, tensor in launch.tensors("codes", "scales").items()}
    case = Case("embedding_lookup_batch", (*ids.shape, len(used), y.shape[-1]), dtype=_dtype(y))
    return [Judgeable(find("embedding_lookup_batch"), case, {"ids": places.view_as(ids), **inputs}, {"y": y})]


def _rotation(launch: Launch) -> tuple[str, ...]:
    if launch.given["angles"] is None:
        return ()
    orders = {number: name for name, number in functional.rope.ORDERS.items()}
    return (f"rope={orders[int(launch.number('order'))]}",)


def _rope(launch: Launch, products: int) -> list[Judgeable]:
    x = launch.tensor("x")
    inputs = {"x": x, "positions": launch.tensor("starts"), "angles": launch.tensor("angles")}
    case = Case("apply_rope", tuple(x.shape), dtype=_dtype(x), options=_rotation(launch))
    return [Judgeable(find("apply_rope"), case, inputs, {"y": launch.left["y"]})]


def _append(launch: Launch, products: int) -> list[Judgeable]:
    """Into a contiguous cache of 16 bits, from what it held before."""
    before = launch.tensors("k_cache", "v_cache")

    def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
        return appended(case, tensors, tensors["k"], tensors["v"], before)

    def predict(case: Case, tensors: Tensors) -> Tensors:
        rows = rotated_bits(case, tensors["k"], tensors)
        return {"k_cache": placed(rows, tensors["positions"], before["k_cache"])}

    k = launch.tensor("k")
    inputs = {**launch.tensors("k", "v", "angles"), "positions": launch.tensor("starts")}
    case = Case("kv_cache_append", (*k.shape, before["k_cache"].shape[2]), dtype=_dtype(k), options=_rotation(launch))
    outputs = {name: launch.left[name] for name in before}
    return [Judgeable(replace(find("kv_cache_append"), golden=golden, predict=predict), case, inputs, outputs)]


def _attention(launch: Launch, products: int) -> list[Judgeable]:
    if launch.kernel.startswith("attention_few") and launch.number("splits") > 1:  # attention_join makes y of these
        return []
    q, k = launch.tensor("q"), launch.tensor("k")
    (B, T, H, D), (Hkv, S) = q.shape, k.shape[1:3]
    window = int(launch.number("window"))
    options = (*(("window=" + str(window),) if window else ()), f"scale={launch.number('scale')!r}")
    if not launch.number("causal"):
        options += ("full",)
    case = Case("attention", (B, T, H, Hkv, D, S), dtype=_dtype(q), options=tuple(sorted(options)))
    inputs = launch.tensors("q", "k", "v", "lengths", "sinks")
    return [Judgeable(find("attention"), case, inputs, {"y": launch.left["y"]}, work=2 * q.numel() * S)]


def _stage(
    of: str,
    name: str,
    shape: tuple[int, ...],
    inputs: Tensors,
    outputs: Tensors,
    golden: Callable[[Tensors], Mapping[str, Expected]],
    predict: Callable[[Tensors], Tensors] | None = None,
) -> Judgeable:
    """A stage of the operator `of`, under that operator's tolerance."""
    op = replace(
        find(of),
        name=name,
        golden=lambda _, tensors: golden(tensors),
        predict=None if predict is None else lambda _, tensors: predict(tensors),
        composed=None,
        places=None,
        operands=None,
    )
    dtype = next((_dtype(x) for x in (*outputs.values(), *inputs.values()) if x.is_floating_point()), "bf16")
    return Judgeable(op, Case(name, shape, dtype=dtype), inputs, outputs)


def _gated(launch: Launch, products: int) -> list[Judgeable]:
    y = launch.left["y"]

    def golden(tensors: Tensors) -> Mapping[str, Expected]:
        return {"y": activations.expected(activations.swiglu, y.dtype, tensors["gate"], tensors["up"])}

    def predict(tensors: Tensors) -> Tensors:
        return {"y": activation_bits.activated(activation_bits.swiglu, y.dtype, tensors["gate"], tensors["up"])}

    inputs = launch.tensors("gate", "up")
    return [_stage("swiglu_ffn_forward", "gated", tuple(y.shape), inputs, {"y": y}, golden, predict)]


def _swiglu(launch: Launch, products: int) -> list[Judgeable]:
    y, (function, bits) = launch.left["y"], _limited(launch)

    def branches(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        x = tensors["x"]
        return (x[:, 0::2], x[:, 1::2]) if launch.number("interleaved") else x.chunk(2, 1)  # type: ignore[return-value]  # two

    def golden(tensors: Tensors) -> Mapping[str, Expected]:
        return {"y": activations.expected(function, y.dtype, *branches(tensors))}

    def predict(tensors: Tensors) -> Tensors:
        return {"y": activation_bits.activated(bits, y.dtype, *branches(tensors))}

    return [_stage("swiglu", "swiglu", tuple(y.shape), launch.tensors("x"), {"y": y}, golden, predict)]


def _route(launch: Launch, products: int) -> list[Judgeable]:
    logits = launch.tensor("logits")
    outputs = {name: launch.left[name] for name in ("ids", "weights")}
    k = outputs["ids"].shape[1]
    shape, inputs = (*logits.shape, k), {"logits": logits}
    return [_stage("moe_router", "moe_route", shape, inputs, outputs, lambda tensors: routed(tensors["logits"], k))]


def _group(launch: Launch, products: int) -> list[Judgeable]:
    """Whose rows are whose: exact."""
    outputs = {name: launch.left[name] for name in ("offsets", "entries")}
    ids, E = launch.tensor("ids"), len(outputs["offsets"]) - 1

    def golden(tensors: Tensors) -> Mapping[str, Expected]:
        flat = tensors["ids"].flatten()
        ends = (flat[:, None] < torch.arange(E + 1)).sum(0)
        return {"offsets": Expected(ends.int()), "entries": Expected(flat.argsort(stable=True).int())}

    stage = _stage("moe_router", "moe_group", (*ids.shape, E), {"ids": ids}, outputs, golden)
    exact = replace(stage.op.tolerance, unit_roundoff=0.0, why="whole numbers")
    return [replace(stage, op=replace(stage.op, tolerance=exact))]


def _combine(launch: Launch, products: int) -> list[Judgeable]:
    y, inputs = launch.left["y"], {"routed_weights": launch.tensor("weights"), "down": launch.tensor("down")}

    def golden(tensors: Tensors) -> Mapping[str, Expected]:
        return {"y": joined(tensors["routed_weights"], tensors["down"], y.dtype)}

    return [_stage("moe_forward", "moe_combine", tuple(y.shape), inputs, {"y": y}, golden)]


_READERS: Mapping[str, Callable[[Launch, int], list[Judgeable]]] = {
    "gemm_": _gemm,
    "dense_": _gemm,
    "rms_norm_": _norm,
    "embedding_packed_": _embedding,
    "rope_": _rope,
    "kv_append_bf16": _append,
    "kv_append_fp16": _append,
    **{
        f"attention_{schedule}_{dtype}": _attention
        for schedule in ("few64", "few128", "many64", "many128", "join")
        for dtype in ("bf16", "fp16")
    },
    "gated_": _gated,
    "swiglu_": _swiglu,
    "moe_route": _route,
    "moe_group": _group,
    "moe_combine_": _combine,
}
"""Kernels by how their names begin."""
