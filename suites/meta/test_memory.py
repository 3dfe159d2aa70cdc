"""Memory arithmetic against the bytes of tensors that were really allocated, and a profile's own arithmetic."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.errors import UserError
from mxharness.functional.memory import Savings
from mxharness.functional.profile import ceilings

HALF = torch.bfloat16


def allocated(*shapes, kept=0, widened=0):
    """Bytes with MXFP4 weights and bytes in 16 bit, from tensors."""
    packed = [mxfp4.quantize(torch.zeros(shape, dtype=HALF)) for shape in shapes]
    beside = [torch.zeros(kept, dtype=HALF), torch.zeros(widened)]
    quantised = sum(part.nbytes for weight in packed for part in weight) + sum(part.nbytes for part in beside)
    plain = sum(torch.zeros(size, dtype=HALF).nbytes for size in (*map(prod, shapes), kept, widened))
    return quantised, plain


@pytest.mark.parametrize(
    ("found", "shapes", "kept", "widened"),
    [
        (functional.vram_savings((3, 64)), [(3, 64)], 0, 0),
        (functional.vram_savings((2, 5, 33), (7, 1), kept=9, widened=4), [(2, 5, 33), (7, 1)], 9, 4),
        (functional.gemm_vram_savings(48, 96), [(48, 96)], 0, 0),
        (functional.gemm_vram_savings(48, 90, bias=True), [(48, 90)], 0, 48),
        (functional.embedding_vram_savings(131, 48), [(131, 48)], 0, 0),
        (functional.lm_head_vram_savings(131, 48), [(131, 48)], 0, 0),
        (functional.ffn_vram_savings(32, 96), [(96, 32), (32, 96)], 0, 0),
        (functional.ffn_vram_savings(32, 96, gated=True, bias=True), [(96, 32)] * 2 + [(32, 96)], 0, 224),
        (functional.attention_vram_savings(64, 4), [(64, 64)] * 4, 0, 0),
        (
            functional.attention_vram_savings(64, 4, 2, 8, bias=True),
            [(32, 64), (16, 64), (16, 64), (64, 32)],
            0,
            32 + 16 + 16 + 64,
        ),
        (
            functional.moe_vram_savings(64, 32, 5),
            [(5, 64, 64), (5, 64, 32)],
            5 * 64,
            5 * 64 + 5 * 64 + 5,
        ),
        (functional.moe_vram_savings(64, 32, 5, bias=False, router=False), [(5, 64, 64), (5, 64, 32)], 0, 0),
    ],
)
def test_bytes_are_those_that_are_allocated(found, shapes, kept, widened):
    quantised, plain = allocated(*shapes, kept=kept, widened=widened)
    assert (found.total, found.sixteen_bit, found.saved) == (quantised, plain, plain - quantised)
    assert found.ratio == plain / quantised
    assert sorted(found.shapes) == sorted(shapes)


def test_whole_blocks_shrink_to_four_and_a_quarter_bits():
    found = functional.gemm_vram_savings(4096, 4096)
    assert 8 * found.total == 4.25 * 4096 * 4096
    assert found.ratio == 64 / 17
    assert str(found) == "8,912,896 bytes instead of 33,554,432: 3.76x less, 24,641,536 saved"


def test_short_rows_are_padded_to_whole_blocks_and_may_cost_more():
    assert functional.vram_savings((10, 33)).mxfp4 == 10 * 2 * 17
    assert functional.vram_savings((10, 8)).saved == -10


def test_savings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        functional.vram_savings((2, 32)).mxfp4 = 1
    assert functional.vram_savings((2, 32)) == Savings(((2, 32),), 34, 0, 128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functional.vram_savings, "at least one shape"),
        (lambda: functional.vram_savings(4096, 4096), "a shape is a sequence of sizes"),
        (lambda: functional.vram_savings(()), "a scalar has no blocks"),
        (lambda: functional.vram_savings((4, 0)), r"size 1 of \(4, 0\) must be a positive integer, not 0"),
        (lambda: functional.vram_savings((4, 32.0)), "must be a positive integer, not 32.0"),
        (lambda: functional.vram_savings((4, 32), widened=-1), "cannot be negative"),
        (lambda: functional.gemm_vram_savings(0, 32), "N must be a positive integer, not 0"),
        (lambda: functional.embedding_vram_savings(10, -1), "K must be"),
        (lambda: functional.lm_head_vram_savings(True, 1), "V must be"),
        (lambda: functional.ffn_vram_savings(32, 0), "intermediate must be"),
        (lambda: functional.attention_vram_savings(64, 5), "64 is not divisible by heads = 5; give head_dim"),
        (lambda: functional.attention_vram_savings(64, 4, 0), "kv_heads must be"),
        (lambda: functional.moe_vram_savings(64, 32, 0), "experts must be"),
    ],
)
def test_sizes_that_make_no_sense_are_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_profile_counts_what_a_call_moves_and_does(device):
    x = torch.randn(3, 64, dtype=HALF).to(device.torch_device)
    weight = mxfp4.quantize(torch.randn(40, 64).to(device.torch_device))
    found = functional.gemm_profile(x, weight, out_dtype=torch.float32, repeats=5, device=device)
    assert found.shape == (3, 40, 64)
    assert found.nbytes == 40 * 64 * 17 // 32 + 2 * 3 * 64 + 4 * 3 * 40
    assert found.flops == 2 * 3 * 40 * 64
    assert 0 < found.fastest <= found.seconds <= found.slowest < 10
    assert found.bandwidth_share == pytest.approx(found.nbytes / found.seconds / found.ceilings.bandwidth)
    assert found.matrix_share == pytest.approx(found.flops / found.seconds / found.ceilings.matrix_rate)
    assert 0 < max(found.bandwidth_share, found.matrix_share) < 1
    assert found.seconds > found.floor
    assert found.ceilings == ceilings(device.torch_device)
    assert ("CUDA graph of 512 calls" if device.name == "cuda" else "wall clock") in str(found)
    assert found.ceilings.source in str(found)


def test_a_larger_product_takes_longer(device):
    x = torch.randn(64, 256, dtype=HALF).to(device.torch_device)
    weight = mxfp4.quantize(torch.randn(512, 256).to(device.torch_device))
    small = functional.gemm_profile(x[:1], mxfp4.Quantized(weight.codes[:16], weight.scales[:16]), repeats=5)
    assert functional.gemm_profile(x, weight, repeats=5).seconds > small.seconds


def test_what_a_profile_refuses():
    x, weight = torch.zeros(1, 32, dtype=HALF), mxfp4.quantize(torch.ones(1, 32))
    with pytest.raises(UserError, match="at least 2 repeats, not 1"):
        functional.gemm_profile(x, weight, repeats=1)
    with pytest.raises(UserError, match=r"x must be \(M, 32\)"):
        functional.gemm_profile(x[:, :16], weight)
