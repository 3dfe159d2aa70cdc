"""Embedding: y[t] = table[ids[t]], the table (V, K) in MXFP4, decoded exactly and rounded once; x + positions.

Gathers and one float32 addition: nothing is left to a tolerance. Tables hold every code and every scale byte, NaN too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, places, regimes
from mxharness import golden as reference
from mxharness.device import Device
from mxharness.op import Case, Expected, Op, Tensors, Tolerance
from mxharness.pattern import Places, along

DTYPES = ("fp32", "bf16", "fp16")

LOOKUP = (
    *(Case("embedding_lookup", (9, 256, 64), regime="cells", dtype=dtype) for dtype in DTYPES),
    *(
        Case("embedding_lookup", (5, 37, K), regime="codes", dtype=dtype, options=("padding",))
        for K in (1, 31, 45, 72, 288)
        for dtype in DTYPES
    ),
    Case("embedding_lookup", (70, 1, 32), regime="codes"),
    Case("embedding_lookup", (9, 11, 45), regime="codes", options=("padding", "unchecked")),
    Case("embedding_lookup", (3, 5, 2880), regime="codes", dtype="fp16", options=("int32",)),
    Case("embedding_lookup", (2048, 1001, 40), regime="codes", options=("int32", "padding")),
)
CACHED = (
    *(
        Case("embedding_lookup_cached", (5, 37, K), regime="codes", dtype=dtype, options=("padding",))
        for K in (1, 45, 96)
        for dtype in DTYPES
    ),
    Case("embedding_lookup_cached", (2048, 19, 40), regime="codes", options=("int32",)),
)
BATCH = (
    *(
        Case("embedding_lookup_batch", (3, 5, 37, K), regime="codes", dtype=dtype, options=("padding",))
        for K in (45, 96)
        for dtype in DTYPES
    ),
    Case("embedding_lookup_batch", (2048, 2, 7, 32), regime="codes", options=("int32",)),
)
POSITIONS = (
    *(
        Case("add_position_embeddings", (B, T, P, K), regime="codes", dtype=dtype, options=options)
        for B, T, P, K in ((1, 6, 6, 64), (3, 5, 11, 45))
        for dtype in DTYPES
        for options in (("mxfp4",), ("start=0",), ("mxfp4", "start=tensor"))
        if (B, options) != (1, ("mxfp4", "start=tensor"))
    ),
    Case("add_position_embeddings", (2, 4, 9, 40), regime="codes", options=("int32", "start=tensor")),
    Case("add_position_embeddings", (1, 7, 12, 32), regime="codes", options=("matrix", "start=5")),
    Case("add_position_embeddings", (4, 3, 9, 40), regime="codes", options=("start=tensor", "unchecked")),
    Case("add_position_embeddings", (2048, 1, 33, 40), regime="codes", options=("matrix", "start=tensor")),
)


def _integers(case: Case, shape: tuple[int, ...], count: int, what: str) -> torch.Tensor:
    """Below `count`, the first 0 and the last count - 1."""
    drawn = torch.from_numpy(regimes.generator(case, what).integers(0, count, shape))
    drawn.view(-1)[0], drawn.view(-1)[-1] = 0, count - 1
    return drawn.to(torch.int32 if "int32" in case.options else torch.int64)


def make_inputs(case: Case) -> Tensors:
    """Ids (T) or (B, T), codes (V, Kp/2), scales (V, Kp/32); the last id but one is the padding id, if there is one."""
    *tokens, V, K = case.shape
    codes, scales = regimes.blocks(case, (V, -(-K // 32) * 32))
    ids = _integers(case, tuple(tokens), V, "ids")
    pad = padding(case)
    if pad is not None and ids.numel() > 1:
        ids.view(-1)[-2] = pad
    if "unchecked" in case.options:
        ids.view(-1)[1:4] = torch.tensor((-1, V, 2**40))
    return {"ids": ids, "codes": codes, "scales": scales}


def padding(case: Case) -> int | None:
    """The id whose embedding is zero."""
    return case.shape[-2] // 2 if "padding" in case.options else None


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Y (T, K) or (B, T, K): the exact rows, rounded once; +0 for the padding id, NaN for one that does not exist."""
    table = reference.decode(mxfp4.unpack(tensors["codes"]), tensors["scales"])[:, : case.shape[-1]]
    ids = tensors["ids"].long()
    # Exact up to float32's end, then one rounding.
    y = _rows(table, ids).to(torch.float32).to(regimes.DTYPES[case.dtype])
    y[ids == padding(case)] = 0.0
    return {"y": Expected(y)}


def _rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The table's rows by id; NaN where it has none."""
    found = table[ids.clamp(0, len(table) - 1)]
    found[(ids < 0) | (ids >= len(table))] = torch.nan
    return found


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Sequence and token, k, and the code and scale that lie there; the id."""
    ids = tensors["ids"].long()
    names = ("sequence", "token")[-ids.ndim :]
    row = ids.clamp(0, len(tensors["codes"]) - 1)
    found = places.decoded(tensors["y"], mxfp4.unpack(tensors["codes"])[row], tensors["scales"][row], *names)
    return {"y": {"id": ids.unsqueeze(-1), **found}}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name."""
    ids, table = inputs["ids"], mxfp4.Quantized(inputs["codes"], inputs["scales"])
    dtype, K, pad = regimes.DTYPES[case.dtype], case.shape[-1], padding(case)
    validate = "unchecked" not in case.options
    match case.op:
        case "embedding_lookup":
            y = functional.embedding_lookup(
                ids, table, dtype=dtype, K=K, padding_id=pad, validate=validate, device=device
            )
        case "embedding_lookup_batch":
            y = functional.embedding_lookup_batch(ids, table, dtype=dtype, K=K, padding_id=pad, device=device)
        case _:
            cache = functional.embedding_cache(table, dtype, K, device=device)
            y = functional.embedding_lookup_cached(ids, cache, padding_id=pad, device=device)
    return {"y": y}


def make_positions(case: Case) -> Tensors:
    """X (B, T, K), a table of positions (P, K) or its codes and scales, starts (B) where they are a tensor."""
    B, T, P, K = case.shape
    rng = regimes.generator(case, "x")
    dtype = regimes.DTYPES[case.dtype]
    inputs = {"x": torch.from_numpy(rng.standard_normal((B, T, K)) * 4).to(torch.float32).to(dtype)}
    if "mxfp4" in case.options:
        inputs["codes"], inputs["scales"] = regimes.blocks(case, (P, -(-K // 32) * 32))
    else:
        inputs["positions"] = torch.from_numpy(rng.standard_normal((P, K))).to(torch.float32).to(dtype)
    if case.option("start") == "tensor":
        inputs["start"] = _integers(case, (B,), P - T + 1, "start")
    if "unchecked" in case.options:  # the first position, the last, or all do not exist
        inputs["start"][:3] = torch.tensor((-1, P - T + 1, 2**40))
    return inputs


def golden_positions(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Y (B, T, K): the sum in float32, rounded once to x's dtype."""
    _, T, _, K = case.shape
    x = tensors["x"]
    start = tensors.get("start")
    if start is None:
        start = torch.full((len(x),), int(case.option("start") or 0), device=x.device)
    if "mxfp4" in case.options:
        table = reference.decode(mxfp4.unpack(tensors["codes"]), tensors["scales"])[:, :K].to(torch.float32)
    else:
        table = tensors["positions"]
    rows = _rows(table.double(), start.long()[:, None] + torch.arange(T, device=x.device))
    # Two float32 summands: float64 rounds far enough away from float32 that rounding again is rounding once.
    return {"y": Expected((x.double() + rows).to(torch.float32).to(x.dtype))}


def where_positions(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Sequence, token, k."""
    return {"y": along(tensors["y"].shape, "sequence", "token", "k")}


def launch_positions(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """With x as (T, K) where the case says matrix: one sequence, or one token of each."""
    x = inputs["x"]
    table = inputs.get("positions")
    positions = mxfp4.Quantized(inputs["codes"], inputs["scales"]) if table is None else table
    start = inputs["start"] if "start" in inputs else int(case.option("start") or 0)
    flat = x.flatten(0, 1) if "matrix" in case.options else x
    validate = "unchecked" not in case.options
    y = functional.add_position_embeddings(flat, positions, start, validate=validate, device=device)
    return {"y": y.view(x.shape)}


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any tokens, vocabulary and width, both integer types, with and without a padding id."""

    def build(T: int, V: int, K: int, dtype: str, options: tuple[str, ...], seed: int) -> Case:
        lead = (1 + seed % 4, T) if name == "embedding_lookup_batch" else (T,)
        return Case(name, (*lead, V, K), regime="codes", dtype=dtype, seed=seed, options=options)

    return st.builds(
        build,
        st.integers(1, 20),
        st.integers(1, 50),
        st.integers(1, 100),
        st.sampled_from(DTYPES),
        st.sampled_from(((), ("padding",), ("int32",), ("int32", "padding"))),
        st.integers(0, 10_000),
    )


def fuzz_positions() -> st.SearchStrategy[Case]:
    """Any batch, length and width; a table of either kind; starts as a number and as a tensor."""
    return st.builds(
        lambda B, T, more, K, dtype, options, seed: Case(
            "add_position_embeddings", (B, T, T + more, K), regime="codes", dtype=dtype, seed=seed, options=options
        ),
        st.integers(1, 5),
        st.integers(1, 9),
        st.integers(0, 9),
        st.integers(1, 70),
        st.sampled_from(DTYPES),
        st.sampled_from(((), ("mxfp4",), ("int32", "start=tensor"), ("mxfp4", "start=tensor"))),
        st.integers(0, 10_000),
    )


def _op(name: str, cases: tuple[Case, ...], axes: str) -> Op:
    positions = name == "add_position_embeddings"
    draw: Callable[[], st.SearchStrategy[Case]] = fuzz_positions if positions else partial(fuzz, name)
    sums = Tolerance(why="one float32 sum, rounded once to x's dtype", source="IEEE 754-2019, section 5.4.1")
    rows = Tolerance(why="a row is gathered and rounded once", source="OCP MX 1.0, sections 5.3.3 and 5.4.1")
    return Op(
        name=name,
        source="embedding.cu",
        axes=axes,
        cases=cases,
        make_inputs=make_positions if positions else make_inputs,
        golden=golden_positions if positions else golden,
        launch=launch_positions if positions else launch,
        tolerance=sums if positions else rows,
        fuzz=draw,
        places=where_positions if positions else where,
        row_axis=axes[0],
        row_inputs=("x", "start") if positions else ("ids",),
    )


OPS = (
    _op("embedding_lookup", LOOKUP, "T V K"),
    _op("embedding_lookup_cached", CACHED, "T V K"),
    _op("embedding_lookup_batch", BATCH, "B T V K"),
    _op("add_position_embeddings", POSITIONS, "B T P K"),
)
