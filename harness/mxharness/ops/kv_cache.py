"""KV cache: append(rotate(k), v), read, and the rotation of rows alone.

(a', b') = (a cos - b sin, b cos + a sin) in float32, rounded to the activations' dtype; an MXFP4 cache then quantises.
The rotation is judged within its bound and predicted bit for bit (two products and a sum, each rounded once); what is
stored is exact: copies, and the bytes of the format's reference for the rounded row. Pages of no sequence and positions
not written stay zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, places, regimes
from mxharness import golden as reference
from mxharness.device import Device
from mxharness.functional.kv_cache import KVCache
from mxharness.op import ONE_STAGE, Case, Expected, Op, Tensors, Tolerance
from mxharness.ops.kv_cache_reference import appended, gathered, placed, rotated, rotated_bits
from mxharness.pattern import Places

REGIMES = ("normal", "specials")
HEAD_DIMS = (32, 64, 80, 96, 128)

_PAIRS = (("half", "bf16"), ("interleaved", "fp16"))
APPEND = (
    *(
        Case("kv_cache_append", shape, regime=regime, dtype=dtype, options=options)
        for shape, options in (
            ((2, 5, 2, 32, 9), ("rope=half",)),
            ((3, 1, 3, 80, 4), ("cache=mxfp4", "rope=interleaved")),
            ((2, 7, 1, 128, 12), ("cache=mxfp4", "page=4", "rope=half")),
            ((2, 4, 2, 96, 11), ("page=3",)),
        )
        for regime in REGIMES
        for dtype in ("bf16", "fp16")
    ),
    *(Case("kv_cache_append", (2, 3, 2, 64, 5), "integers", dtype, options=(f"rope={o}",)) for o, dtype in _PAIRS),
    Case("kv_cache_append", (1, 130, 1, 64, 130), options=("page=16", "rope=interleaved")),
    Case("kv_cache_append", (2048, 1, 1, 32, 2), options=("cache=mxfp4", "rope=half")),
    Case("kv_cache_append", (1, 3, 1, 80, 3), regime="tiny", options=("cache=mxfp4",)),
)
READ = tuple(
    Case("kv_cache_read", shape, regime="specials", dtype=dtype, options=options)
    for shape, options in (
        ((2, 5, 2, 32), ()),
        ((3, 9, 2, 80), ("cache=mxfp4",)),
        ((2, 7, 1, 96), ("cache=mxfp4", "page=3")),
        ((2, 10, 3, 64), ("page=4",)),
        ((1, 3, 1, 128), ("cache=mxfp4", "page=1")),
        ((2048, 1, 1, 32), ()),
    )
    for dtype in ("bf16", "fp16")
)
ROPE = (
    *(
        Case("apply_rope", shape, dtype=dtype, options=(f"rope={order}",))
        for shape in ((2, 5, 3, 32), (1, 70, 1, 64), (3, 1, 8, 80), (2, 2, 2, 96), (1, 3, 1, 128))
        for order in ("half", "interleaved")
        for dtype in ("bf16", "fp16")
    ),
    Case("apply_rope", (2, 3, 2, 64), options=("rope=yarn",)),
    *(Case("apply_rope", (3, 4, 2, 80), "integers", dtype, options=(f"rope={order}",)) for order, dtype in _PAIRS),
    Case("apply_rope", (2048, 1, 1, 32), options=("rope=half",)),
)
PAST = 40
"""Positions of a rope table beyond those a case needs."""


def angles(case: Case, length: int, D: int) -> torch.Tensor | None:
    """The table (length, D/2, 2) that the case asks for; None where it rotates nothing."""
    if case.option("rope") is not None and case.regime == "integers":  # eighths for cosines and sines: exact products
        return torch.from_numpy(regimes.generator(case, "angles").integers(-8, 9, (length, D // 2, 2)) / 8).float()
    match case.option("rope"):
        case None:
            return None
        case "yarn":
            return functional.rope_table(length, D, 150_000.0, scaling=functional.Yarn(original_context=32))
    return functional.rope_table(length, D, 100.0)  # fast enough that every pair turns


def rope_of(case: Case, inputs: Tensors) -> functional.Rope | None:
    """The rotation that the case asks for."""
    if "angles" not in inputs:
        return None
    return functional.Rope(inputs["angles"], "interleaved" if case.option("rope") == "interleaved" else "half")


def tables(case: Case, B: int, S: int) -> dict[str, torch.Tensor]:
    """Where the cache is paged, its table (B, columns + 1), each page once in random order; the last is never used."""
    if case.option("page") is None:
        return {}
    columns = -(-S // int(case.option("page") or 1)) + 1
    order = regimes.generator(case, "table").permutation(B * columns).reshape(B, columns)
    return {"table": torch.from_numpy(order).to(torch.int32)}


def make_inputs(case: Case) -> Tensors:
    """K, v (B, T, Hkv, D), positions (B) int32, a table of pages, angles; for a rotation x instead."""
    if case.op == "kv_cache_read":
        return stored_inputs(case, *case.shape)
    B, T, H, D = case.shape[:4]
    S = case.shape[4] if case.op == "kv_cache_append" else T + PAST
    starts = torch.from_numpy(regimes.generator(case, "positions").integers(0, S - T + 1, B)).to(torch.int32)
    names = ("x",) if case.op == "apply_rope" else ("k", "v")
    inputs = {name: regimes.tensor(_named(case, name), (B, T, H, D)) for name in names}
    inputs |= {"positions": starts, **tables(case, B, S)}
    table = angles(case, S, D)
    return inputs if table is None else {**inputs, "angles": table}


def _named(case: Case, name: str) -> Case:
    """The same case with other random numbers."""
    return Case(f"{case.op} {name}", case.shape, case.regime, case.dtype, seed=case.seed)


def stored_inputs(case: Case, B: int, S: int, H: int, D: int) -> dict[str, torch.Tensor]:
    """A cache's tensors, filled with anything: k, v, their scales where it is MXFP4, or pages and a table of them."""
    paged = tables(case, B, S)
    kind = "_pages" if paged else ""
    lead = (paged["table"].numel(), H, int(case.option("page") or 1)) if paged else (B, H, S)
    found = dict(paged)
    for name in ("k", "v"):
        if case.option("cache") != "mxfp4":
            found[name + kind] = regimes.tensor(_named(case, name), (*lead, D))
            continue
        rng, blocks = regimes.generator(case, name), -(-D // 32)
        scales = rng.integers(100, 140, (*lead, blocks))
        scales[rng.random(scales.shape) < 0.02] = mxfp4.SCALE_NAN
        found[name + kind] = torch.from_numpy(rng.integers(0, 256, (*lead, 16 * blocks))).to(torch.uint8)
        found[f"{name}_scales{kind}"] = torch.from_numpy(scales).to(torch.uint8)
    return found


def cache_of(case: Case, inputs: Tensors, S: int, D: int, B: int) -> KVCache:
    """The record over tensors that stored_inputs made."""
    kind = "_pages" if "table" in inputs else ""
    table = inputs["table"][:, :-1].contiguous() if kind else None
    scales = [inputs.get(f"{name}_scales{kind}") for name in ("k", "v")]
    k, v = inputs["k" + kind], inputs["v" + kind]
    return KVCache(k, v, scales[0], scales[1], table, B, S, D, regimes.DTYPES[case.dtype])


def empty_cache(device: Device, case: Case, inputs: Tensors, B: int, H: int, S: int, D: int) -> KVCache:
    """A zeroed cache as the case asks for."""
    kind, page, table = case.option("cache") or case.dtype, case.option("page"), inputs.get("table")
    return functional.kv_cache(
        B, H, S, D, kind, activations=regimes.DTYPES[case.dtype], page=int(page) if page else None,
        pages=int(table.max()) + 1 if table is not None else None,
        table=table[:, :-1].contiguous() if table is not None else None, device=device,
    )  # fmt: skip


def contents(device: Device, cache: KVCache, table: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a cache holds, by sequence: (B, Hkv, positions, ..), the page that is never used at the end."""
    found = {"k_cache": cache.k, "v_cache": cache.v}
    if cache.k_scales is not None and cache.v_scales is not None:
        found |= {"k_cache_scales": cache.k_scales, "v_cache_scales": cache.v_scales}
    if table is None:
        return found
    whole = {}
    for name, pages in found.items():
        rows = gathered(pages, table)
        whole[name] = device.empty(tuple(rows.shape), rows.dtype)
        whole[name].copy_(rows)
    return whole


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Y of a rotation; the cache after an append, from zeros; the rows that were read."""
    if case.op == "apply_rope":
        return {"y": rotated(case, tensors["x"], tensors)}
    if case.op == "kv_cache_read":
        return {name: Expected(x) for name, x in decoded(case, tensors).items()}
    zeros = {name: torch.zeros_like(tensors[name]) for name in tensors if "_cache" in name}
    return appended(case, tensors, tensors["k"], tensors["v"], zeros)


def decoded(case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The rows of a cache's tensors (B, Hkv, S, D), rounded once to the activations' dtype."""
    _, S, _, D = case.shape
    kind, found = ("_pages" if "table" in tensors else ""), {}
    for name in ("k", "v"):
        rows = tensors[name + kind]
        if case.option("cache") == "mxfp4":
            values = reference.decode(mxfp4.unpack(rows), tensors[f"{name}_scales{kind}"])[..., :D]
            rows = values.to(torch.float32).to(regimes.DTYPES[case.dtype])
        if kind:
            rows = gathered(rows, tensors["table"][:, :-1])[:, :, :S]
        found[name + "_rows"] = rows
    return found


def predict(case: Case, tensors: Tensors) -> Tensors:
    """As golden, in bits."""
    if case.op == "apply_rope":
        return {"y": rotated_bits(case, tensors["x"], tensors)}
    if case.option("cache") == "mxfp4":
        return {name: want.value for name, want in golden(case, tensors).items()}
    starts, before = tensors["positions"], torch.zeros_like(tensors["k_cache"])
    return {"k_cache": placed(rotated_bits(case, tensors["k"], tensors), starts, before)}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name; an append is followed by a look into the cache."""
    if case.op == "apply_rope":
        rope = rope_of(case, inputs)
        if rope is None:
            raise ValueError(f"{case} has no table of angles")
        return {"y": functional.apply_rope(inputs["x"], rope, inputs["positions"], device=device)}
    if case.op == "kv_cache_read":
        _, S, _, D = case.shape
        B = (inputs["table"] if "table" in inputs else inputs["k"]).shape[0]
        k, v = functional.kv_cache_read(cache_of(case, inputs, S, D, B), device=device)
        return {"k_rows": k, "v_rows": v}
    _, _, H, D, S = case.shape
    k, v = inputs["k"], inputs["v"]
    cache = empty_cache(device, case, inputs, k.shape[0], H, S, D)
    functional.kv_cache_append(cache, k, v, inputs["positions"], rope=rope_of(case, inputs), device=device)
    return contents(device, cache, inputs.get("table"))


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Sequence, head, position, page; of an MXFP4 cache its bytes and scales."""
    if case.op == "apply_rope":
        return {"y": places.heads(tensors["y"], case.shape[2], tensors["positions"])}
    return cached(case, tensors, None if case.op == "kv_cache_read" else case.shape[1])


def cached(case: Case, tensors: Tensors, T: int | None) -> dict[str, Places]:
    """Of a cache's contents, or of its rows; T tokens were appended, none if it was only read."""
    page, starts = case.option("page"), None if T is None else tensors["positions"]
    found: dict[str, Places] = {}
    for name in tensors:
        if name.endswith(("_cache", "_cache_scales", "_rows")):
            packed = "byte" if tensors[name].dtype == torch.uint8 else "dimension"
            last = "scale index" if name.endswith("scales") else packed
            found[name] = places.cache(tensors[name], last, int(page) if page else None, starts, T or 0)
    return found


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any sequences, tokens, heads, head_dim, kind of cache and page."""

    def build(sizes: tuple[int, int, int], D: int, room: int, draw: int, dtype: str, seed: int) -> Case:
        B, T, H = sizes
        rope = ("half", "interleaved", "yarn")[draw % 3]
        cache = ("cache=mxfp4",) if draw % 2 else ()
        page = (f"page={1 + seed % 7}",) if draw % 5 < 2 else ()
        if name == "apply_rope":
            return Case(name, (B, T, H, D), dtype=dtype, seed=seed, options=(f"rope={rope}",))
        if name == "kv_cache_read":
            return Case(name, (B, T, H, D), regime="specials", dtype=dtype, seed=seed, options=(*cache, *page))
        options = (*cache, *page, *((f"rope={rope}",) if draw % 7 else ()))
        return Case(name, (B, T, H, D, T + room), regime=REGIMES[draw % 2], dtype=dtype, seed=seed, options=options)

    return st.builds(
        build,
        st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 3)),
        st.sampled_from(HEAD_DIMS),
        st.integers(0, 9),
        st.integers(0, 209),
        st.sampled_from(("bf16", "fp16")),
        st.integers(0, 10_000),
    )


def _op(name: str, cases: tuple[Case, ...], axes: str, rows: tuple[str, ...]) -> Op:
    exact = name == "kv_cache_read"
    return Op(
        name=name,
        source="kv_cache.cu",
        axes=axes,
        cases=cases,
        make_inputs=make_inputs,
        golden=golden,
        launch=launch,
        tolerance=Tolerance(
            why="rows are copied or decoded" if exact else "two products and their sum in float32, rounded once more",
            unit_roundoff=0.0 if exact else 2.0**-24,
            source="OCP MX 1.0, section 5" if exact else "gamma_2 (|a cos| + |b sin|), RoFormer, equation 34",
            ceiling=0.05,
        ),
        fuzz=partial(fuzz, name),
        predict=None if exact else predict,
        without={} if exact else ONE_STAGE,
        places=where,
        row_axis="B",
        row_inputs=rows,
    )


OPS = (
    _op("apply_rope", ROPE, "B T H D", ("x", "positions")),
    _op("kv_cache_append", APPEND, "B T Hkv D S", ("k", "v", "positions", "table")),
    _op("kv_cache_read", READ, "B S Hkv D", ("k", "v", "k_scales", "v_scales", "table")),
)
