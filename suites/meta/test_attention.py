"""Attention and its cache as a user meets them: prefill and decode, pages, the cost of MXFP4, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.device import host
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.functional import QKV, Projections, Rope, Yarn, attention_schedule
from mxharness.ops.attention_bits import FACTOR
from mxharness.ops.kv_cache import HEAD_DIMS
from mxharness.regimes import DTYPES


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions(*starts):
    return torch.tensor(starts, dtype=torch.int32)


def weight(N, K, seed=0):
    return mxfp4.quantize(normal(N, K, seed=seed, dtype=torch.float32) * 0.2)


def bits(x):
    return x.contiguous().view(torch.int16)


def upload(device, tree):
    """Every tensor of a tuple or dictionary on the device."""
    if isinstance(tree, dict):
        return {name: upload(device, value) for name, value in tree.items()}
    if isinstance(tree, Rope):
        return Rope(device.upload(tree.table), tree.order)
    if isinstance(tree, tuple):
        values = [upload(device, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return device.upload(tree) if isinstance(tree, torch.Tensor) else tree


def block(device, x, pieces, D, *, page=None, table=None, kind="bf16", options=None):
    """A grouped block over tokens x (B, T, K) handed over in pieces; the outputs side by side."""
    B, T, K = x.shape
    H, Hkv = 4, 2
    activations = torch.float16 if kind == "fp16" else torch.bfloat16
    cache = functional.kv_cache(B, Hkv, T, D, kind, activations=activations, page=page, table=table, device=device)
    qkv, out = weight((H + 2 * Hkv) * D, K, 1), weight(48, H * D, 2)
    found, start = [], 0
    for piece in x.split(pieces, 1):
        arguments = (piece.contiguous(), qkv, out, positions(*[start] * B))
        x_piece, qkv_there, out_there, where = (upload(device, a) for a in arguments)
        found.append(
            functional.grouped_query_attention(
                x_piece, qkv_there, out_there, cache, where, device=device, **upload(device, options or {})
            )
        )
        start += piece.shape[1]
    device.synchronize()
    return torch.cat([y.cpu() for y in found], 1)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "mxfp4"])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_prefill_has_the_bits_of_step_by_step_decode(device, D, kind):
    """Past two borders of chunks, with everything on: whole, in uneven pieces, and token by token."""
    x = normal(2, 130, 32, seed=D, dtype=torch.float16 if kind == "fp16" else torch.bfloat16)
    options = {
        "rope": Rope(functional.rope_table(130, D, scaling=Yarn(original_context=64))),
        "sinks": normal(4, dtype=torch.float32),
        "window": 70,
    }
    whole = block(device, x, 130, D, kind=kind, options=options)
    for pieces in ([63, 1, 1, 62, 3], 1 if D == 64 else 37):
        assert torch.equal(bits(block(device, x, pieces, D, kind=kind, options=options)), bits(whole))


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
@pytest.mark.parametrize("page", [1, 5, 16, 64, 200])
def test_a_paged_cache_has_the_bits_of_a_contiguous_one(device, page, kind):
    x, columns = normal(2, 70, 32), -(-70 // page)
    table = torch.randperm(2 * columns, generator=torch.Generator().manual_seed(page)).reshape(2, columns).int()
    paged = block(device, x, [66, 1, 3], 32, page=page, table=device.upload(table), kind=kind)
    assert torch.equal(bits(paged), bits(block(device, x, [66, 1, 3], 32, kind=kind)))


def test_sequences_may_share_the_pages_of_a_prefix(device):
    """Read together, written apart."""
    k, v, q = (normal(1, 40, 1, 64, seed=seed) for seed in range(3))
    cache = functional.kv_cache(
        2, 1, 48, 64, page=16, table=device.upload(torch.tensor([[0, 1, 2], [0, 1, 3]]).int()), device=device
    )
    prefix = functional.kv_cache(1, 1, 48, 64, page=16, device=device)
    functional.kv_cache_append(prefix, *upload(device, (k, v, positions(0))), device=device)
    cache.k[:2], cache.v[:2] = prefix.k[:2], prefix.v[:2]
    tail = upload(device, tuple(x[:, 32:].expand(2, -1, -1, -1).contiguous() for x in (k, v)))
    functional.kv_cache_append(cache, *tail, device.upload(positions(32, 32)), device=device)
    queries = device.upload(q[:, -3:].expand(2, -1, -1, -1).contiguous())
    both = functional.attention(queries, cache, device.upload(positions(40, 40)), device=device)
    alone = functional.attention(queries[:1].contiguous(), prefix, device.upload(positions(40)), device=device)
    device.synchronize()
    assert torch.equal(bits(both[0].cpu()), bits(alone[0].cpu()))
    assert torch.equal(bits(both[1].cpu()), bits(alone[0].cpu()))


def test_one_fused_weight_has_the_bits_of_three(device):
    x, parts = normal(2, 5, 64), [weight(rows, 64, rows) for rows in (256, 128, 129 - 1)]
    fused = mxfp4.Quantized(*(torch.cat(each) for each in zip(*parts, strict=True)))
    bias = [normal(rows, dtype=torch.float32, seed=rows) for rows in (256, 128, 128)]
    out, found = weight(40, 256), []
    for qkv, b in ((fused, torch.cat(bias)), (Projections(*parts), QKV(*bias))):
        cache = functional.kv_cache(2, 2, 5, 64, device=device)
        arguments = (upload(device, tree) for tree in (x, qkv, out))
        there = [*arguments, cache, device.upload(positions(0, 0))]
        found.append(functional.grouped_query_attention(*there, bias=upload(device, b), device=device).cpu())
    device.synchronize()
    assert torch.equal(bits(found[0]), bits(found[1]))


# the cost of an MXFP4 cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_an_mxfp4_cache_loses_what_the_format_loses(device, D):
    """Its own budget, decoded against what was stored: 18.8 dB for normal rows (docs/format.md); 4.25 bits an element.

    A row of 80 is three blocks, the last half empty.
    """
    k, v = normal(1, 256, 2, D, seed=1), normal(1, 256, 2, D, seed=2)
    cache = functional.kv_cache(1, 2, 256, D, "mxfp4", device=device)
    functional.kv_cache_append(cache, *upload(device, (k, v, positions(0))), device=device)
    read = functional.kv_cache_read(cache, device=device)
    device.synchronize()
    for stored, x in zip(read, (k, v), strict=True):
        rows = x.transpose(1, 2).double()
        ratio = 10 * torch.log10(rows.square().sum() / (stored.cpu().double() - rows).square().sum())
        assert 18.6 < ratio < 19.0
    assert cache.nbytes == 2 * 2 * 256 * (17 * -(-D // 32))
    assert functional.kv_cache(1, 2, 256, D, device=device).nbytes == 2 * 2 * 256 * 2 * D


# what is refused ---------------------------------------------------------------------------------------------------


def idle(device):
    """The device, on which nothing may be launched."""

    def launch(_source, kernel, *_arguments):
        raise AssertionError(f"launched {kernel}")

    return SimpleNamespace(torch_device=device.torch_device, empty=device.empty, launch=launch)


def contiguous(**changes: object):
    return functional.kv_cache(**{"batch": 2, "kv_heads": 2, "length": 20, "head_dim": 32, **changes})


def paged(table):
    return contiguous(page=8, pages=6, table=torch.tensor(table, dtype=torch.int32))


ROWS, QUERIES = normal(2, 3, 2, 32), normal(2, 3, 4, 32)
TABLE = [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("room for 20 positions, 21", lambda d: append(d, contiguous(), positions(0, 18))),
        ("must not be negative, the smallest is -1", lambda d: append(d, contiguous(), positions(0, -1))),
        ("positions must be int32", lambda d: append(d, contiguous(), torch.tensor([0, 1]))),
        ("names page 6; the cache has the pages 0 to 5", lambda d: append(d, paged([[0, 1, 2], [6, 4, 5]]))),
        ("names page -1", lambda d: append(d, paged([[-1, 1, 2], TABLE[1]]))),
        ("are the same page", lambda d: append(d, paged([[0, 1, 2], [0, 4, 5]]))),
        ("are the same page", lambda d: append(d, paged([[0, 0, 2], TABLE[1]]), positions(7, 0))),
        ("k must be torch.bfloat16", lambda d: append(d, contiguous(), k=ROWS.half())),
        (r"v must be torch.bfloat16 \(2, 3, 2, 32\)", lambda d: append(d, contiguous(), v=ROWS[:, :, :1].contiguous())),
        ("contiguous heads", lambda d: append(d, contiguous(), k=normal(2, 3, 32, 2).mT)),
        ("table holds 5 positions, 6", lambda d: append(d, contiguous(), positions(0, 3), rope=turn(5))),
        (r"table must be float32 \(positions, 16, 2\)", lambda d: append(d, contiguous(), rope=turn(9, 64))),
        ("no order 'other'", lambda d: append(d, contiguous(), rope=Rope(turn(9).table, "other"))),
        ("room for 20 positions, 21", lambda d: attend(d, contiguous(), positions(3, 21))),
        ("need lengths of at least 3, the smallest is 2", lambda d: attend(d, contiguous(), positions(3, 2))),
        ("window must be at least 1", lambda d: attend(d, contiguous(), window=0)),
        ("window must be at least 1", lambda d: attend(d, contiguous(), window=4, causal=False)),
        ("sinks must be float32", lambda d: attend(d, contiguous(), sinks=torch.zeros(2))),
        ("a multiple of 2", lambda d: attend(d, contiguous(), q=normal(2, 3, 3, 32))),
        ("q must be torch.float16", lambda d: attend(d, contiguous(dtype="fp16"))),
        ("names page 9", lambda d: attend(d, paged([[0, 9, 2], TABLE[1]]), positions(9, 3))),
        ("D one of 32, 64, 80, 96, 128", lambda d: attend(d, contiguous(), q=normal(2, 3, 4, 48))),
        ("no size 0", lambda d: attend(d, contiguous(), q=normal(2, 0, 4, 32))),
        ("a length must be at least 1", lambda d: functional.kv_cache_read(contiguous(), 0, device=d)),
        ("room for 20", lambda d: functional.kv_cache_read(contiguous(), 21, device=d)),
        ("no cache of dtype 'int8'", lambda _: contiguous(dtype="int8")),
        ("cannot be for activations", lambda _: contiguous(dtype="bf16", activations=torch.float16)),
        ("sizes of at least 1", lambda _: contiguous(batch=0)),
        ("a head_dim of 32, 64", lambda _: contiguous(head_dim=48)),
        ("need the size of a page", lambda _: contiguous(pages=3)),
        (r"table must be int32 \(2, 3\)", lambda _: contiguous(page=8, table=torch.zeros(2, 2).int())),
        ("as many heads of queries as of keys", lambda d: mix(d, functional.multi_head_attention)),
        ("do not project to", lambda d: mix(d, qkv=weight(8 * 32 + 1, 64))),
        ("do not project to", lambda d: mix(d, qkv=Projections(weight(128, 64), weight(64, 64), weight(32, 64)))),
        (r"output codes must be \(N, 64\)", lambda d: mix(d, output=weight(40, 64))),
        ("a fused weight takes one bias", lambda d: mix(d, bias=QKV(*torch.zeros(3, 64)))),
        ("room for 20 positions", lambda d: mix(d, start=18)),
        ("x must be torch.bfloat16", lambda d: mix(d, x=normal(2, 3, 64).half())),
        (r"x must be torch.bfloat16 \(2, T, K\)", lambda d: mix(d, x=normal(3, 3, 64))),
        (r"x must be \(M, 64\)", lambda d: mix(d, x=normal(2, 3, 96))),
        ("sinks must be float32 of shape", lambda d: mix(d, sinks=torch.zeros(5))),
        ("output_bias must be float32 of shape", lambda d: mix(d, output_bias=torch.zeros(5))),
        ("bias must be float32 of shape", lambda d: mix(d, bias=torch.zeros(5))),
        ("window must be at least 1", lambda d: mix(d, window=0)),
        (
            "has 256 rows, not 64",
            lambda d: functional.fused_qkv_projection(ROWS[0, 0], weight(64, 32), 4, 2, 32, device=d),
        ),
        ("length of at least 1", lambda _: functional.rope_table(0, 32)),
        ("an even head_dim", lambda _: functional.rope_table(4, 31)),
        ("a base above 1", lambda _: functional.rope_table(4, 32, 1.0)),
    ],
)
def test_what_cannot_work_is_one_error_before_any_launch(words, call):
    """Python refuses, the same on every device."""
    with pytest.raises(UserError, match=words):
        call(idle(host.open_device()))


def append(device, cache, where=None, *, k=ROWS, v=ROWS, rope=None):
    functional.kv_cache_append(cache, k, v, positions(0, 0) if where is None else where, rope=rope, device=device)


def attend(device, cache, lengths=None, *, q=QUERIES, **options: object):
    functional.attention(q, cache, positions(3, 5) if lengths is None else lengths, device=device, **options)


def turn(length, D=32):
    return Rope(functional.rope_table(length, D))


def mix(device, function=functional.grouped_query_attention, *, start=0, **changes: object):
    arguments = {"x": normal(2, 3, 64), "qkv": weight(8 * 32, 64), "output": weight(40, 128), **changes}
    function(**arguments, cache=contiguous(), positions=positions(start, start), device=device)


QUERY = """[](float x) {
    const int n = static_cast<int>(x), G = n < 45000 ? n % 200 + 1 : n, first = n / 200 * 192, length = 0;
    const Problem problem = {&length, nullptr, 1 << 12, G, 64, 0, 1.0f, 1, 0};
    const Tile tile = tile_at(problem, {nullptr, 1, 0, 0}, 0, 0, first);
    for (int r = first; r < first + 192; ++r)
        if (tile.query(r) != r / G) return 0.0f;
    return 1.0f;
}"""


@pytest.mark.parametrize("T", [1, 65, 257], ids=["few", "many", "wide"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("sink", [-torch.inf, -3.0, None])
def test_a_query_that_sees_no_key_gives_zeros_whatever_its_sink(T, D, sink, device):
    cache = functional.kv_cache(1, 1, T + 5, D, device=device)
    q, lengths = device.upload(normal(1, T, 1, D)), device.upload(torch.zeros(1, dtype=torch.int32))
    sinks = None if sink is None else device.upload(torch.full((1,), sink))
    y = functional.attention(q, cache, lengths, causal=False, sinks=sinks, device=device)
    device.synchronize()
    assert torch.equal(y.cpu(), torch.zeros(1, T, 1, D, dtype=y.dtype))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    "options", [{}, {"window": 40}, {"window": 190}, {"sinks": True}, {"causal": False}, {"special": True}], ids=str
)
def test_tiles_that_share_a_block_have_the_bits_of_tiles_alone(D, options, device, monkeypatch):
    """Of one chunk and of several, of sequences of different lengths; where nothing is causal one has no key at all."""
    if device.name != "host" and device.device_class != "sm_90":
        pytest.skip("only Hopper's kernels and the host's have such blocks")
    monkeypatch.setattr(attention_schedule, "kernel_of", lambda *_: "wide")
    cache = functional.kv_cache(4, 2, 400, D, device=device)
    k, v = (normal(4, 2, 400, D, seed=seed) for seed in (1, 2))
    if "special" in options:
        v[1, 1, 100, 3], v[2, 0, 5, 60] = torch.inf, torch.nan
    cache.k.copy_(k)
    cache.v.copy_(v)
    sinks = device.upload(normal(6, dtype=torch.float32)) if "sinks" in options else None
    T, H = (200, 2) if options.get("window") == 190 else (70, 6)  # where a tile's warpgroups begin at different chunks
    q = device.upload(normal(4, T, H, D))
    lengths = torch.tensor([T, T + 63, 2 * T, 0 if "causal" in options else T + 1], dtype=torch.int32)
    kept = {name: value for name, value in options.items() if name in ("window", "causal")}

    def bits(blocks, cached):
        monkeypatch.setattr(attention_schedule, "WIDE_BLOCKS", blocks)
        monkeypatch.setattr(attention_schedule, "MOST_CACHED", cached)
        attention_schedule.heads_at_once.cache_clear()
        y = functional.attention(q, cache, device.upload(lengths), sinks=sinks, device=device, **kept)
        device.synchronize()
        return y.cpu().view(torch.int16)

    alone = bits(132, 1 << 30)
    shared = {(blocks, cached): bits(blocks, cached) for blocks in (1, 3, 7) for cached in (0, 1 << 30)}
    attention_schedule.heads_at_once.cache_clear()
    assert [how for how, y in shared.items() if not torch.equal(y, alone)] == []


def test_a_rows_query_without_a_division_is_that_of_one():
    x = torch.arange(0, 46_000, 23, dtype=torch.float32)
    text = shipped().replaced("elementary.cu", '#include "math.cuh"', '#include "attention_wide.cuh"')
    device = host.open_device(text.replaced("elementary.cu", "count, exp32)", f"count, {QUERY})"))
    right, count = device.empty(x.shape, torch.float32), np.int64(len(x))
    device.launch("elementary.cu", "elementary_exp", (-(-len(x) // 256),), (256,), right, device.upload(x), count)
    device.synchronize()
    assert (right == 1).all()


@pytest.mark.parametrize(("dtype", "bits", "least", "clear"), [("bf16", 7, -126, 6.6e-7), ("fp16", 10, -25, 3.3e-7)])
def test_no_weight_lies_where_an_approximate_power_might_be_rounded_otherwise(dtype, bits, least, clear):
    """The GPU's unit is off by 2^-22 at most, a product by 2^-24; weights.cuh counts on both together being less."""
    factor = float(FACTOR[DTYPES[dtype]])
    weights = factor * np.exp2(np.arange(least * 4096, 1).astype(np.longdouble) / 4096)
    exponent = np.frexp(weights)[1] - 1
    spacing = np.ldexp(np.longdouble(1), np.maximum(exponent, -14 if dtype == "fp16" else -126) - bits)
    halves = weights / spacing - np.longdouble(0.5)
    apart = (np.abs(halves - np.rint(halves)) * spacing / weights)[np.rint(halves) >= 0]
    assert len(apart) > 100_000 * (dtype == "fp16")
    assert apart.min() > clear > 2.0**-22 + 2.0**-24
