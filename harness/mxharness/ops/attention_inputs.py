"""Inputs of the attention operators.

What lies in a cache past a sequence's length, and pages of no sequence, are NaN, so that a key too many shows.
"""

from __future__ import annotations

import torch

from mxharness import mxfp4, regimes
from mxharness.op import Case, Tensors
from mxharness.ops.kv_cache import angles, tables

PROJECTIONS = ("q", "k", "v")
N_OUT = 33
"""Features of a block's output: no multiple of a tile."""


def make_inputs(case: Case) -> Tensors:
    """What the case's function takes, by kind of function."""
    match case.op:
        case "qkv_projection" | "fused_qkv_projection":
            M, K, H, Hkv, D = case.shape
            return {"x": regimes.activations(case, (M, K)), **_projections(case, H, Hkv, D, K)}
        case "attention_output_projection":
            B, T, N, H, D = case.shape
            codes, scales = regimes.weights(case, (N, H * D))
            inputs = {"x": regimes.activations(case, (B, T, H, D)), "codes": codes, "scales": scales}
            return {**inputs, "bias": regimes.bias(case, N)} if "bias" in case.options else inputs
        case "attention":
            return _core_inputs(case)
    return _block_inputs(case)


def _block_inputs(case: Case) -> Tensors:
    """A block's: activations and the past have a mean in each channel, as those of models do.

    Averages over keys then do not cancel, and the whole function's bound stays below its result.
    """
    B, T, K, Hkv, G, D, P = case.shape
    H = Hkv * G
    rng = regimes.generator(case, "positions")
    codes, scales = regimes.weights(case, (N_OUT, H * D), "output")
    found = {
        "x": regimes.activations(case, (B, T, K)) + 1,
        **_projections(case, H, Hkv, D, K),
        "codes": codes,
        "scales": scales,
        "positions": torch.from_numpy(rng.integers(P // 2, P + 1, B)).to(torch.int32),
        **tables(case, B, T + P),
    }
    for name in "kv" if P else "":
        mean = regimes.activations(case, (Hkv, D), f"mean {name}") / 2
        found[f"past_{name}"] = regimes.activations(case, (B, P, Hkv, D), f"past {name}") / 8 + mean
    if "bias" in case.options:
        found["bias"] = regimes.bias(case, N_OUT)
    if "sinks" in case.options:
        found["sinks"] = regimes.bias(case, H, "sinks")
    table = angles(case, T + P, D)
    return found if table is None else {**found, "angles": table}


def _projections(case: Case, H: int, Hkv: int, D: int, K: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, heads in zip(PROJECTIONS, (H, Hkv, Hkv), strict=True):
        codes, scales = regimes.weights(case, (heads * D, K), name)
        found |= {f"{name}_codes": codes, f"{name}_scales": scales}
        if "bias" in case.options:
            bias = regimes.bias(case, heads * D, f"{name} bias")
            found[f"{name}_bias"] = bias if case.op.endswith("projection") else bias / 8
    if not is_fused(case):
        return found
    parts = [part for part in ("codes", "scales", "bias") if f"q_{part}" in found]
    return {f"qkv_{part}": torch.cat([found[f"{name}_{part}"] for name in PROJECTIONS]) for part in parts}


def is_fused(case: Case) -> bool:
    """Whether queries, keys and values come from one weight."""
    return case.op == "fused_qkv_projection" or "fused" in case.options


def _core_inputs(case: Case) -> Tensors:
    B, T, H, Hkv, D, S = case.shape
    rng = regimes.generator(case, "lengths")
    lengths = torch.from_numpy(rng.integers(T, S + 1, B)).to(torch.int32)
    lengths[0] = 0 if "empty" in case.options else S
    plain = Case(f"{case.op} core", case.shape, dtype=case.dtype, seed=case.seed)
    q = regimes.activations(plain, (B, T, H, D), "q") * (30 if case.regime == "large" else 1)
    if case.regime == "blocked":  # a whole chunk of keys has scores of -Inf: weight 0, not NaN
        q[..., 0] = 1
    found: dict[str, torch.Tensor] = {"q": q, "lengths": lengths, **tables(case, B, S)}
    if "sinks" in case.options:
        found["sinks"] = regimes.bias(plain, H, "sinks")
    for name in "kv":
        rows = regimes.activations(plain, (B, Hkv, S, D), name)
        if case.regime == "equal" and name == "k":
            rows = rows[:, :, :1].expand_as(rows).contiguous()
        if case.regime == "blocked" and name == "k":
            rows[:, :, :70, 0] = -torch.inf
        broken = torch.arange(S)[None, :] >= lengths[:, None]
        if case.regime == "nan":  # late in the sequence, so that some queries do not see it
            broken = broken | (torch.arange(S) == S - (2 if name == "v" else 1))
        broken = broken[:, None, :].expand(B, Hkv, S)
        stored = {name: rows.masked_fill(broken.unsqueeze(-1), torch.nan)}
        if case.option("cache") == "mxfp4":
            codes, scales = mxfp4.quantize(rows)
            stored = {name: codes, f"{name}_scales": scales.masked_fill(broken.unsqueeze(-1), mxfp4.SCALE_NAN)}
        found |= _paged(case, stored, found["table"]) if "table" in found else stored
    return found


def _paged(case: Case, stored: Tensors, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows (B, Hkv, S, ..) cut into the table's pages; what no sequence uses is NaN in all dtypes: bytes 255."""
    page, found = int(case.option("page") or 1), {}
    for name, rows in stored.items():
        columns = table.shape[1] - 1
        padded = torch.nn.functional.pad(rows.view(torch.uint8), (0, 0, 0, columns * page - rows.shape[2]), value=255)
        pages = torch.full((table.numel(), rows.shape[1], page, padded.shape[-1]), 255, dtype=torch.uint8)
        cut = padded.reshape(*padded.shape[:2], columns, page, -1)
        pages[table[:, :-1].long()] = cut.transpose(1, 2)
        found[f"{name}_pages"] = pages.view(rows.dtype)
    return found
