"""What the bench measures: the rows it selects, and what it counts of each."""

from __future__ import annotations

import re

import pytest
from mxharness.bench import entries, layers, work
from mxharness.bench.entries import ENTRIES
from mxharness.errors import UserError

from .rows import TINY, entry


def test_there_is_a_row_for_every_shape_of_the_peers_and_every_operator_and_each_has_a_name_of_its_own():
    keys = [one.key for one in ENTRIES]
    assert len(set(keys)) == len(keys)
    assert {one.op for one in ENTRIES} == set(TINY)
    products = {(one.shape, one.rows, one.dtype) for one in ENTRIES if one.op == "gemm"}
    assert len(products) == len(entries.SHAPES) * 7 * 2
    assert {(one.shape[0], one.rows) for one in ENTRIES if one.op == "moe"} == {
        (experts, tokens) for experts in (32, 128) for tokens in (1, 16, 256, 2048)
    }
    assert all(len(one.shape) == len(one.axes.split()) for one in ENTRIES)


def test_selection_by_operator_shape_rows_and_the_quick_few():
    found = entries.select(["gemm"], ["4096x4096", "2880x2880"], [1, 16])
    assert {(one.op, one.label, one.rows) for one in found} == {
        ("gemm", shape, rows) for shape in ("2880x2880", "4096x4096") for rows in (1, 16)
    }
    assert entries.select() == list(ENTRIES)
    quick = entries.select(quick=True)
    assert 16 <= len(quick) <= 40
    assert {"gemm", "moe", "attention_decode", "dequantize"} <= {one.op for one in quick}
    assert all(one.rows for one in entries.select(rows=[16]))


@pytest.mark.parametrize(
    ("ops", "shapes", "rows", "quick", "message"),
    [
        (["gem"], [], [], False, "no operator 'gem' there; there are dequantize, quantize, gemm, "),
        (["gemm"], ["1x1"], [], False, "no shape '1x1' there; there are 2880x2880, 5760x2880, "),
        (["gemm"], [], [3], False, "no row count '3' there; there are 1, 4, 16, 64, 256, 512, 2048"),
        (["moe"], [], [2048], True, "no quick row has this operator, shape and row count; leave out --quick"),
    ],
)
def test_what_no_row_has_is_refused_with_what_there_is(ops, shapes, rows, quick, message):
    with pytest.raises(UserError, match=re.escape(message)):
        entries.select(ops, shapes, rows, quick=quick)


def test_the_floor_is_the_larger_of_bytes_and_operations():
    assert work.floor_seconds(3_050, 844, 3.05e12, 844e12) == 1e-9
    assert work.floor_seconds(1, 8_440, 3.05e12, 844e12) == 1e-11
    assert work.floor_seconds(6_100, 844_000, 3.05e12, 844e12) == 2e-9


def test_a_product_counts_17_bytes_a_block_and_each_activation_once(meter, few_copies):
    made = entry("gemm", rows=5).work(meter)
    assert made.nbytes == 48 * 64 * 17 // 32 + 2 * 5 * 64 + 2 * 5 * 48
    assert made.flops == 2 * 5 * 48 * 64
    assert entry("gemm_persistent").work(meter).nbytes == 2 * 48 * 64 + 2 * 5 * (48 + 64)
    assert entry("dequantize").work(meter).nbytes == 48 * 64 * 17 // 32 + 2 * 48 * 64


def test_causal_attention_counts_the_pairs_that_are_seen(meter, few_copies):
    prefill, decode = (entry(f"attention_{kind}").work(meter) for kind in ("prefill", "decode"))
    assert prefill.flops == 4 * 4 * 32 * (5 * 6 // 2)
    assert decode.flops == 4 * 4 * 32 * 5 * 40
    assert decode.nbytes == 2 * 5 * 2 * 40 * 32 * 2 + 2 * 2 * 5 * 4 * 32


def test_experts_count_as_often_as_some_token_meets_them(meter, few_copies):
    one = work.packed_bytes(64, 64) + work.packed_bytes(64, 32)
    made = entry("moe", rows=1).work(meter)
    assert made.nbytes == layers.CHOSEN * one + 4 * 64 + 2 * 8 * 64
    assert made.flops == 2 * (layers.CHOSEN * 3 * 32 * 64 + 8 * 64)
