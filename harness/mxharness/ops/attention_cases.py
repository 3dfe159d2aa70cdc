"""Cases of the attention operators, their inputs, and how more are drawn.

What lies in a cache past a sequence's length, and pages of no sequence, are NaN, so that a key too many shows.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from mxharness import mxfp4, regimes
from mxharness.op import Case, Tensors
from mxharness.ops.attention_reference import CHUNK
from mxharness.ops.kv_cache import HEAD_DIMS, angles, tables

PROJECTIONS = ("q", "k", "v")
N_OUT = 17
"""Features of a block's output: no multiple of a tile."""

QKV = tuple(
    Case(name, shape, regime=regime, dtype=dtype, options=options)
    for name in ("qkv_projection", "fused_qkv_projection")
    for shape, options in (((5, 160, 3, 1, 32), ()), ((33, 64, 2, 1, 80), ("bias",)), ((9, 32, 4, 2, 64), ("bias",)))
    for regime in ("normal", "integers", "wide")
    for dtype in ("bf16", "fp16")
    if (regime, dtype) != ("wide", "fp16")  # results past half's range
)
OUTPUT = (
    *(
        Case("attention_output_projection", shape, regime=regime, dtype=dtype, options=options)
        for shape, options in (((3, 2, 33, 2, 64), ()), ((1, 70, 65, 2, 80), ("bias",)), ((4, 1, 40, 3, 32), ("bias",)))
        for regime in ("normal", "integers")
        for dtype in ("bf16", "fp16")
    ),
    Case("attention_output_projection", (2048, 1, 18, 1, 64)),
)
SEEN = 32
"""Equal keys that each query sees where values are integers: a power of two, by which their sum is divided exactly."""
CORE = (
    *(
        Case("attention", shape, regime=regime, dtype=dtype, options=options)
        for shape, regime, options in (
            ((1, 1, 1, 1, 32, 1), "normal", ()),  # one key
            ((2, 1, 4, 1, 64, 127), "normal", ("page=16",)),
            ((2, 1, 8, 1, 128, 129), "normal", ("sinks",)),
            ((3, 1, 3, 3, 80, 258), "normal", ("sinks", "window=20")),
            ((2, 5, 6, 2, 96, 128), "normal", ("sinks",)),
            ((1, 134, 2, 1, 32, 200), "normal", ("sinks", "window=70")),
            ((1, 9, 8, 1, 128, 258), "normal", ("window=1",)),
            ((2, 18, 3, 1, 32, 40), "normal", ("page=7", "window=5")),
            ((2, 7, 2, 1, 80, 129), "normal", ("cache=mxfp4", "page=16")),
            ((2, 1, 4, 4, 128, 257), "normal", ("cache=mxfp4", "sinks", "window=140")),
            ((1, 3, 4, 1, 96, 66), "normal", ("cache=mxfp4",)),
            ((2, 4, 2, 2, 64, 70), "normal", ("full", "scale=0.3")),
            ((2, 3, 4, 2, 64, 70), "large", ("sinks",)),
            ((2, 3, 4, 2, 64, 258), "equal", ()),
            ((2, 9, 4, 2, 64, 250), "nan", ()),
            ((2, 3, 2, 1, 32, 70), "nan", ("cache=mxfp4", "window=9")),
            ((1, 3, 2, 1, 32, 258), "blocked", ()),
            ((1, 9, 2, 1, 32, 250), "infinite", ()),
            ((1, 3, 4, 2, 32, 258), "faint", ("sinks",)),
            ((3, 5, 4, 2, 64, 260), "integers", (f"window={SEEN}",)),
        )
        for dtype in ("bf16", "fp16")
    ),
    Case("attention", (1, 16, 4, 1, 64, 330), "cancelling", "fp16", options=("scale=0.06",)),
    Case("attention", (2048, 1, 1, 1, 32, 2)),
    Case("attention", (3, 2, 2, 1, 32, 8), options=("empty", "full")),
    Case("attention", (3, 2, 2, 1, 32, 300), options=("empty", "full")),  # others' keys are shared by several blocks
    Case("attention", (1, 40, 1, 1, 32, 70), options=("full",)),  # rows of several blocks see keys after their own
    # Queries enough for Hopper's warpgroup products.
    Case("attention", (1, 256, 1, 1, 64, 390), dtype="bf16", options=("sinks", "window=100")),
    Case("attention", (1, 257, 1, 1, 128, 330), "nan", "fp16"),
)
HEADS = tuple(
    {"multi_head_attention": (Hkv, 1), "grouped_query_attention": grouped}
    for Hkv, grouped in ((2, (2, 2)), (1, (1, 4)), (1, (1, 3)), (1, (1, 2)))
)
"""Hkv and G of either block."""
BLOCKS = tuple(
    Case(name, (*shape[:3], *heads[name], *shape[3:]), regime=regime, dtype=dtype, options=options)
    for shape, heads, regime, options in (
        ((2, 3, 64, 32, 4), HEADS[0], "normal", ("fused", "rope=half")),
        ((1, 9, 32, 64, 124), HEADS[0], "normal", ("page=16", "rope=interleaved", "window=20")),
        ((2, 1, 64, 96, 134), HEADS[1], "normal", ("bias", "fused", "rope=yarn", "sinks")),
        ((1, 2, 96, 80, 1), HEADS[0], "normal", ()),
        ((2, 2, 64, 64, 5), HEADS[3], "normal", ("cache=mxfp4", "fused", "rope=half")),
        ((1, 5, 32, 128, 0), HEADS[2], "normal", ("bias", "cache=mxfp4", "page=4")),
        ((2048, 1, 32, 32, 1), HEADS[3], "normal", ("fused", "rope=half")),
        ((3, 2, 64, 32, 4), HEADS[0], "integers", ("bias", "rope=half", "window=1")),  # a lone key's weight is 1
        ((2, 3, 32, 64, 2), HEADS[3], "integers", ("fused", "rope=interleaved", "window=1")),
    )
    for name in heads
    for dtype in ("bf16", "fp16")
    if shape[0] < 2048 or dtype == "bf16"
)
"""B T K Hkv G D P: G query heads on each of Hkv; P positions lie in the cache before, some sequences keep fewer."""


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
    codes, scales = _weights(case, (N_OUT, H * D), "output")
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
        codes, scales = _weights(case, (heads * D, K), name)
        found |= {f"{name}_codes": codes, f"{name}_scales": scales}
        if "bias" in case.options:
            bias = regimes.bias(case, heads * D, f"{name} bias")
            found[f"{name}_bias"] = bias if case.op.endswith("projection") else bias / 8
    if not is_fused(case):
        return found
    parts = [part for part in ("codes", "scales", "bias") if f"q_{part}" in found]
    return {f"qkv_{part}": torch.cat([found[f"{name}_{part}"] for name in PROJECTIONS]) for part in parts}


def _weights(case: Case, shape: tuple[int, int], name: str) -> mxfp4.Quantized:
    """Of integers, a block's are so small that queries and keys are a few units, and half holds its results."""
    if case.regime == "integers" and not case.op.endswith("projection"):
        return regimes.integer_weights(case, shape, name, spread=1, shift=-6)
    return regimes.weights(case, shape, name)


def is_fused(case: Case) -> bool:
    """Whether queries, keys and values come from one weight."""
    return case.op == "fused_qkv_projection" or "fused" in case.options


def _core_inputs(case: Case) -> Tensors:
    B, T, H, Hkv, D, S = case.shape
    rng = regimes.generator(case, "lengths")
    least = T + (SEEN - 1 if case.regime == "integers" else 0)
    lengths = torch.from_numpy(rng.integers(least, S + 1, B)).to(torch.int32)
    lengths[0] = 0 if "empty" in case.options else S
    regime = case.regime if case.regime == "integers" else "normal"
    plain = Case(f"{case.op} core", case.shape, regime, case.dtype, seed=case.seed)
    q = regimes.activations(plain, (B, T, H, D), "q") * (30 if case.regime == "large" else 1)
    if case.regime in ("blocked", "faint", "infinite"):  # then the first element of a key shifts its scores
        q[..., 0] = 1
    found: dict[str, torch.Tensor] = {"q": q, "lengths": lengths, **tables(case, B, S)}
    if "sinks" in case.options:
        found["sinks"] = regimes.bias(plain, H, "sinks")
        if case.regime == "faint":  # past half's range; this head sees nothing but its sink
            found["sinks"][0] = 1e5
    for name in "kv":
        rows = _arranged(case, name, regimes.activations(plain, (B, Hkv, S, D), name))
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


def _arranged(case: Case, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, Hkv, S, D) as the case's regime wants them.

    cancelling  half of the values nearly cancel the other half under weights that are nearly the same: what float32
              sums lose on the way shows in 16 bits
    blocked   a whole chunk of keys has scores of -Inf: weight 0, not NaN
    faint     chunks whose weights no half could hold decide the result, as their values are so much larger
    infinite  two values are Inf, in one half of a word each, that some queries of the block do not see: one's weight is
              too small for half, the other's is 0
    """
    S, keys = rows.shape[2], name == "k"
    match case.regime:
        case "equal" | "integers" if keys:
            return rows[:, :, :1].expand_as(rows).contiguous()
        case "cancelling" if not keys:
            return torch.where(torch.arange(S) < S // 2, 1, -1).unsqueeze(-1) * (rows * 0.15 + 1)
        case "blocked" if keys:
            rows[:, :, : CHUNK + 6, 0] = -torch.inf
        case "faint":
            middle = torch.arange(S) // CHUNK == 1
            if keys:
                rows[..., 0] = torch.where(middle, 0.0, -102.0)  # e^-18
            else:
                rows *= torch.where(middle, 2.0**-18, 2.0**13).unsqueeze(-1)
        case "infinite" if keys:
            rows[:, :, S - 6, 0] = -120.0 if case.dtype == "bf16" else -30.0  # e^-21; half's weights end at e^-16
            rows[:, :, S - 2, 0] = -torch.inf
        case "infinite":
            rows /= 8  # nothing else has an exponent like theirs, shifted by a bit
            rows[:, :, S - 6, 5] = torch.inf
            rows[:, :, S - 2, 8] = torch.inf
        case _:
            pass
    return rows


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


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any sequences, tokens, heads and head_dim, kinds of cache, window and sinks, around the chunks' borders."""

    def build(B: int, T: int, H: tuple[int, int], D: int, past: int, draw: int, dtype: str, seed: int) -> Case:
        Hkv, G = H
        bias, fused = ("bias",) if draw % 2 else (), ("fused",) if draw % 3 else ()
        if name.endswith("qkv_projection"):
            return Case(name, (T, 32 * B, Hkv * G % 3 + 1, 1, D), dtype=dtype, seed=seed, options=bias)
        if name == "attention_output_projection":
            return Case(name, (B, T, 1 + past % 40, 2, D), dtype=dtype, seed=seed, options=bias)
        cache = ("cache=mxfp4",) if draw % 5 < 2 else ()
        page = (f"page={1 + seed % 33}",) if draw % 7 < 3 else ()
        window = (f"window={1 + seed % 80}",) if draw % 3 else ()
        options = (*cache, *page, *(("sinks",) if draw % 11 < 4 else ()), *window)
        if name == "attention":
            return Case(name, (B, T, Hkv * G, Hkv, D, T + past), dtype=dtype, seed=seed, options=options)
        rope = (f"rope={('half', 'interleaved', 'yarn')[draw % 3]}",)
        G = 1 if name == "multi_head_attention" else G % 2 + 2
        Hkv = 1 if G * D % 32 == 0 else 2
        shape = (B % 2 + 1, T % 3 + 1, 32, Hkv, G, D, past)
        if cache or Hkv * G * D > 128:  # else the whole function's bound proves nothing
            dtype = "fp16"
        return Case(name, shape, dtype=dtype, seed=seed, options=tuple(sorted((*bias, *fused, *rope, *options))))

    return st.builds(
        build,
        st.integers(1, 3),
        st.integers(1, 9),
        st.tuples(st.integers(1, 2), st.integers(1, 4)),
        st.sampled_from(HEAD_DIMS),
        st.one_of(st.integers(0, 12), st.integers(55, 70), st.integers(120, 135), st.integers(250, 260)),
        st.integers(0, 10_000),
        st.sampled_from(("bf16", "fp16")),
        st.integers(0, 10_000),
    )
