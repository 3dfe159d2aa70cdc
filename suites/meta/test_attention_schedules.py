"""Attention's schedules: which one a call takes, and that none of them shows in the bits."""

from __future__ import annotations

import sys

import pytest
import torch
from mxharness import functional
from mxharness.device import host
from mxharness.execution import execute
from mxharness.functional import attention_schedule
from mxharness.functional.attention_schedule import Schedule, schedule
from mxharness.judge import digest
from mxharness.op import Case
from mxharness.ops import find


def few(*_):
    return "few"


def many(*_):
    return "many"


def wide(q, cache, _):
    return "wide" if cache.k_scales is None and q.shape[3] in attention_schedule.WIDE_GROUPS else "many"


EVERY, NEVER = dict.fromkeys((64, 128), 10**6), dict.fromkeys((64, 128), 0)
FORCED = {
    "wide, and many where it is not for": {"kernel_of": wide},
    "wide, one block for all tiles, and many": {"kernel_of": wide, "WIDE_BLOCKS": 1},
    "wide, three blocks, and many": {"kernel_of": wide, "WIDE_BLOCKS": 3},
    "many": {"kernel_of": many},
    "few, a block for all keys of a tile": {"kernel_of": few, "SPLIT_BLOCKS": NEVER, "SPLIT_CODES": 0},
    "few, two chunks a block": {"kernel_of": few, "SPLIT_BLOCKS": dict.fromkeys((64, 128), 10), "SPLIT_CODES": 20},
    "few, a block for every chunk": {
        "kernel_of": few, "SPLIT_BLOCKS": EVERY, "SPLIT_CODES": 10**6, "WHOLE_TILES": 10**6,
    },
}  # fmt: skip
INFINITE = [Case("attention", (1, 9, 2, 1, D, 260), "infinite", dtype) for D, dtype in ((64, "bf16"), (128, "fp16"))]
"""Values that are Inf in heads that the wide kernels take, which add them to their own columns."""
SCALED = [
    Case("attention", (1, 9, 2, 1, D, 260), dtype=dtype, options=(f"scale={scale}",))
    for D, dtype in ((64, "bf16"), (128, "fp16"))
    for scale in ("-0.1", "1e13", "0.0")
]
"""Scores of the other sign; bases past 2^23, where products are whole numbers; scores that are all the same."""
CASES = [*(case for case in find("attention").cases if case.shape[0] < 100), *INFINITE, *SCALED]


def bits(case):
    op = find("attention")
    return digest(execute(op, case, host.open_device(), op.make_inputs(case)).outputs)


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("forced", [wide, many, few], ids=lambda kernel: kernel.__name__)
def test_unusual_scales_have_the_declared_bits(case, forced, monkeypatch):
    """With the first queries zero, a thread has a row of moderate scores beside one of huge ones."""
    op = find("attention")
    inputs = op.make_inputs(case)
    inputs["q"][:, :4] = 0
    assert bool((op.golden(case, inputs)["y"].value.isfinite()).all())
    monkeypatch.setattr(attention_schedule, "kernel_of", forced)
    found = execute(op, case, host.open_device(), inputs).outputs
    assert digest(found) == digest(op.predict(case, inputs))
    assert bool(found["y"].isfinite().all())


@pytest.fixture(scope="module")
def expected():
    return {case: bits(case) for case in CASES}


@pytest.mark.parametrize("forced", FORCED)
def test_every_schedule_has_the_same_bits(forced, expected, monkeypatch):
    taken = set()
    module = sys.modules["mxharness.functional.attention"]  # whose name the function of the package has
    monkeypatch.setattr(
        module, "schedule", lambda *call: (how := schedule(*call), taken.add((how.kernel, how.splits)))[0]
    )
    for name, value in FORCED[forced].items():
        monkeypatch.setattr(attention_schedule, name, value)
    assert {case for case in CASES if bits(case) != expected[case]} == set()
    split = {splits for _, splits in taken if splits > 1}
    assert {kernel for kernel, _ in taken} == {kernel for kernel in ("few", "many", "wide") if kernel in forced}
    assert bool(split) == ("two" in forced or "every" in forced)


@pytest.mark.parametrize(
    ("shape", "positions", "window", "expected"),
    [
        ((1, 1, 32, 8), 8192, None, Schedule("few", 1, 33, 64)),
        ((1, 1, 32, 8), 128, None, Schedule("few", 1)),
        ((1, 1, 32, 8), 256, None, Schedule("few", 1)),  # two chunks: a second kernel takes longer
        ((1, 1, 32, 8), 257, None, Schedule("few", 1, 3, 3)),
        ((32, 1, 32, 8), 8192, None, Schedule("few", 1)),  # blocks enough without
        ((13, 1, 32, 8), 8192, None, Schedule("few", 1, 2, 64)),
        ((14, 1, 32, 8), 8192, None, Schedule("few", 1)),  # 112 tiles
        ((1, 1, 64, 8), 8192, 128, Schedule("few", 1, 3, 3)),
        ((1, 4, 32, 8), 1024, None, Schedule("few", 1, 8, 8)),  # 16 rows
        ((1, 17, 8, 8), 256, None, Schedule("many", 1)),
        ((1, 17, 8, 8), 257, None, Schedule("few", 2, 3, 3)),
        ((1, 64, 8, 8), 1025, None, Schedule("few", 4, 8, 9)),
        ((1, 65, 8, 8), 8192, None, Schedule("many", 2)),
        ((1, 2048, 32, 32), 2048, None, Schedule("many", 32)),  # heads of 32
    ],
)
def test_a_call_takes_the_schedule_of_its_shape(shape, positions, window, expected):
    cpu = host.open_device()
    B, T, H, Hkv = shape
    cache = functional.kv_cache(B, Hkv, positions, 32, device=cpu)
    assert schedule(torch.empty(B, T, H, 32, dtype=torch.bfloat16), cache, window, "sm_90") == expected


@pytest.mark.parametrize(
    ("shape", "positions", "D", "expected"),
    [
        ((1, 129, 8, 8), 129, 128, "wide"),  # queries from which on it is always wide
        ((1, 128, 8, 8), 128, 128, "few"),
        ((1, 192, 8, 8), 192, 64, "wide"),
        ((1, 191, 8, 8), 191, 64, "few"),
        ((264, 16, 1, 1), 128, 128, "few"),  # rows of a tile, however many of these
        ((265, 16, 1, 1), 128, 128, "few"),
        ((132, 17, 1, 1), 128, 128, "few"),  # two tiles each, over one chunk of keys
        ((133, 17, 1, 1), 128, 128, "wide"),
        ((66, 17, 1, 1), 129, 128, "few"),  # and over two
        ((67, 17, 1, 1), 129, 128, "wide"),
        ((132, 17, 1, 1), 129, 64, "few"),
        ((133, 17, 1, 1), 129, 64, "many"),
        ((999, 64, 1, 1), 129, 64, "many"),  # a tile of many
        ((66, 65, 1, 1), 129, 64, "many"),
        ((67, 65, 1, 1), 129, 64, "wide"),
        ((132, 65, 1, 1), 128, 64, "many"),
        ((133, 65, 1, 1), 128, 64, "wide"),
    ],
)
def test_hopper_takes_small_tiles_where_large_ones_would_be_too_few(shape, positions, D, expected):
    B, T, H, Hkv = shape
    cache = functional.kv_cache(1, Hkv, positions, D, device=host.open_device())
    q = torch.empty(B, T, H, D, dtype=torch.bfloat16)
    for device_class in ("sm_90", "host"):
        assert schedule(q, cache, None, device_class).kernel == expected
    assert schedule(q, cache, None, "sm_80").kernel in ("few", "many")


@pytest.mark.parametrize(
    ("D", "B", "expected"),
    [(64, 14, 1), (64, 13, 2), (64, 1, 33), (128, 14, 1), (128, 9, 1), (128, 8, 2), (128, 1, 16)],
)
def test_large_heads_are_split_over_half_as_many_blocks(D, B, expected):
    cache = functional.kv_cache(B, 8, 8192, D, device=host.open_device())
    assert schedule(torch.empty(B, 1, 8, D, dtype=torch.bfloat16), cache, None, "sm_90").splits == expected


@pytest.mark.parametrize(
    ("T", "D", "dtype", "device_class", "expected"),
    [
        (256, 128, "bf16", "sm_90", Schedule("wide", 4)),
        (257, 128, "bf16", "sm_90", Schedule("wide", 5)),
        (288, 64, "fp16", "host", Schedule("wide", 3)),  # tiles of 192 rows
        (289, 64, "fp16", "host", Schedule("wide", 4)),
        (256, 96, "bf16", "sm_90", Schedule("many", 8)),
        (256, 128, "mxfp4", "sm_90", Schedule("many", 8)),
        (256, 128, "bf16", "sm_80", Schedule("many", 8)),
    ],
)
def test_hopper_takes_wide_kernels_for_many_rows_over_caches_of_16_bits(T, D, dtype, device_class, expected):
    cache = functional.kv_cache(1, 2, 300, D, dtype, device=host.open_device())
    assert schedule(torch.empty(1, T, 4, D, dtype=cache.dtype), cache, None, device_class) == expected


@pytest.mark.parametrize(
    ("heads", "tiles", "size", "together"),
    [(8, 64, 1 << 20, 8), (40, 4, 1 << 20, 40), (256, 4, 1 << 18, 88), (128, 16, 1 << 20, 22), (4, 1024, 16 << 20, 1)],
)
def test_heads_whose_keys_the_cache_holds_are_taken_together(heads, tiles, size, together):
    assert attention_schedule.heads_at_once(heads, tiles, size) == together


def test_blocks_share_tiles_and_none_takes_more_than_it_can():
    assert [attention_schedule.wide_blocks(n) for n in (1, 131, 133, 132 * 256, 132 * 256 + 1)] == [
        1,
        131,
        132,
        132,
        133,
    ]


def test_codes_are_split_over_twice_as_many_blocks():
    cache = functional.kv_cache(16, 8, 8192, 32, "mxfp4", device=host.open_device())
    q = torch.empty(16, 1, 32, 32, dtype=torch.bfloat16)
    assert schedule(q, cache, None, "sm_90") == Schedule("few", 1, 4, 64)
