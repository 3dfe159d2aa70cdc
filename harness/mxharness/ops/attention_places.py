"""What the places of attention's outputs mean, and which input to zero where a fault along K is sought."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mxharness import places
from mxharness.op import Case, Operand, Tensors
from mxharness.ops.attention_cases import PROJECTIONS
from mxharness.ops.kv_cache import cached
from mxharness.pattern import Places


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Head, KV head, position of whatever has heads; row and feature of the output."""
    if case.op == "attention":
        B, T, _, Hkv = case.shape[:4]
        return {"y": places.heads(tensors["y"], Hkv, tensors["lengths"][:B] - T)}
    if case.op == "attention_output_projection":
        return {"y": places.product(tensors["y"], "sequence", "token")}
    D, found = case.shape[4 if case.op.endswith("qkv_projection") else 5], {}
    for name in PROJECTIONS:
        y = tensors[name]
        feature = torch.arange(y.shape[-1]).expand(*([1] * (y.ndim - 1)), -1)
        rows = ("row",) if y.ndim == 2 else ("sequence", "token")
        found[name] = {**places.product(y, *rows), "head": feature // D, "dimension": feature % D}
    if case.op.endswith("qkv_projection"):
        return found
    Hkv, positions = case.shape[3], tensors["positions"]
    heads = {name: places.heads(tensors[name], Hkv, positions) for name in ("rotated", "heads") if name in tensors}
    caches = cached(case, tensors, case.shape[1])
    return {**found, **heads, **caches, "y": places.product(tensors["y"], "sequence", "token")}


def operands(case: Case) -> Mapping[str, Operand]:
    """The projections' rows; of an output that follows attention, its weight."""
    if case.op == "attention_output_projection":
        return {"y": Operand("x", 2)}
    rows = {name: Operand("x") for name in PROJECTIONS}
    return rows if case.op.endswith("qkv_projection") else {**rows, "y": Operand("codes")}
