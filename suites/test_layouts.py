"""Layouts, byte for byte: written out, against the reference packer, against one another, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mxharness import golden, mxfp4
from mxharness.mxfp4 import LAYOUTS, Packed, Quantized

# The bytes of one block whose element j has code j mod 16, under scale byte 0x7F.
LINEAR = "10 32 54 76 98 BA DC FE " * 2
WRITTEN_OUT = {
    "linear": (LINEAR, "7F"),
    "high_first": ("01 23 45 67 89 AB CD EF " * 2, "7F"),
    "scale_last": (LINEAR + "7F", None),
    "gguf": ("7F 00 11 22 33 44 55 66 77 88 99 AA BB CC DD EE FF", None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_bytes_written_out(layout: str) -> None:
    codes = mxfp4.pack(torch.arange(32, dtype=torch.uint8).remainder(16)[None])
    data, scales = mxfp4.to_layout(Quantized(codes, torch.tensor([[127]], dtype=torch.uint8)), layout)
    want_data, want_scales = WRITTEN_OUT[layout]
    assert bytes(data.flatten().tolist()) == bytes.fromhex(want_data)
    assert (scales is None) == (want_scales is None)
    if scales is not None and want_scales is not None:
        assert bytes(scales.flatten().tolist()) == bytes.fromhex(want_scales)


def random_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.uint8)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_the_reference_packer(layout: str, blocks: int) -> None:
    quantized = Quantized(random_bytes((2, 5, blocks * 16)), random_bytes((2, 5, blocks)))
    want_data, want_scales = golden.pack(mxfp4.unpack(quantized.codes), quantized.scales, layout)
    data, scales = mxfp4.to_layout(quantized, layout)
    assert torch.equal(data, want_data)
    assert (scales is None) == (want_scales is None)
    back = mxfp4.from_layout(Packed(want_data, want_scales), layout)
    assert back.codes.is_contiguous()  # kernels take addresses
    assert back.scales.is_contiguous()
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)


@pytest.mark.parametrize(("written", "read"), tuple(itertools.permutations(LAYOUTS, 2)))
def test_a_layout_read_as_another_is_wrong(written: str, read: str) -> None:
    """The negative control: the same bytes under another name never decode to the same values."""
    quantized = mxfp4.quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    data, scales = mxfp4.to_layout(quantized, written)
    stream = torch.cat((data.flatten(), data.new_empty(0) if scales is None else scales.flatten()))
    if LAYOUTS[read].scale == "separate":
        packed = Packed(stream[: 4 * 32].reshape(4, 32), stream[4 * 32 :].reshape(4, 2))
    else:
        packed = Packed(stream.reshape(4, 34), None)
    assert not torch.equal(mxfp4.dequantize(*mxfp4.from_layout(packed, read)), mxfp4.dequantize(*quantized))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 3), data=st.data())
def test_layouts_round_trip(layout: str, rows: int, blocks: int, data: st.DataObject) -> None:
    stream = data.draw(st.binary(min_size=rows * blocks * 17, max_size=rows * blocks * 17))
    every = torch.tensor(list(stream), dtype=torch.uint8)
    codes, scales = every[: rows * blocks * 16].reshape(rows, -1), every[rows * blocks * 16 :].reshape(rows, -1)
    packed = mxfp4.to_layout(Quantized(codes, scales), layout)
    back = mxfp4.from_layout(packed, layout)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scales, scales)
    stored = packed.data.numel() + (0 if packed.scales is None else packed.scales.numel())
    assert stored == mxfp4.nbytes((rows, blocks * 32)) == rows * blocks * 32 * 4.25 / 8


def test_nbytes_counts_padded_rows() -> None:
    assert mxfp4.nbytes((4096, 4096)) * 8 == 4096 * 4096 * 4.25
    assert mxfp4.nbytes((3, 33)) == 3 * 2 * 17
    assert mxfp4.nbytes((0, 33)) == 0
