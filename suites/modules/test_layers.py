"""Linear and embedding layers: the bits of the functions beneath, any input that torch's take, sentences for others."""

from __future__ import annotations

import copy

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.errors import UserError
from mxharness.mxfp4 import Quantized
from mxharness.nn import MXFP4Embedding, MXFP4Linear

from .layers import HALVES, same_bits, same_state

# A linear layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("K", [64, 45])
def test_a_linear_layer_has_the_bits_of_gemm(where, K, dtype, bias):
    layer = MXFP4Linear(K, 21, bias, device=where)
    x = torch.randn(2, 5, K, device=where).to(dtype)
    padded = torch.zeros(10, 64, dtype=dtype, device=where)
    padded[:, :K] = x.view(10, K)
    weight = Quantized(layer.codes, layer.scales)
    wanted = functional.gemm_bias(padded, weight, layer.bias) if bias else functional.gemm(padded, weight)
    assert same_bits(layer(x), wanted.view(2, 5, 21))


@pytest.mark.parametrize("K", [64, 45, 1])
def test_a_linear_layer_is_a_product_with_its_decoded_weight(where, K):
    linear = torch.nn.Linear(K, 21, device=where)
    layer = MXFP4Linear.from_linear(linear)
    x = torch.randn(7, K, device=where).bfloat16()
    w = mxfp4.dequantize(*mxfp4.quantize(linear.weight))[:, :K].double()
    wanted = x.double() @ w.T + linear.bias.double()
    bound = (K + 2) * 2**-23 * (x.double().abs() @ w.abs().T + linear.bias.abs()) + 2**-8 * wanted.abs()
    assert bool(((layer(x).double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_float32_input_is_rounded_and_its_sums_are_not(where, dtype):
    layer = MXFP4Linear(64, 21, device=where, compute_dtype=dtype)
    x = torch.randn(4, 64, device=where)
    wanted = functional.gemm_bias(x.to(dtype), layer.packed, layer.bias, out_dtype=torch.float32)
    assert same_bits(layer(x), wanted)
    assert not torch.equal(wanted, wanted.to(dtype).float())


def test_any_view_of_an_input_works(where):
    layer = MXFP4Linear(32, 8, device=where)
    data = torch.randn(6, 65, device=where).bfloat16()
    for view in (data[:, 1:33], data[::2, :32], data.view(-1)[3:35], data[:, :32].T.contiguous().T, data[0, 1:33]):
        assert same_bits(layer(view), layer(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(0, 45), (3, 0, 45)])
def test_no_rows_give_no_rows(where, shape, dtype):
    y = MXFP4Linear(45, 8, device=where)(torch.empty(shape, dtype=dtype, device=where))
    assert (y.shape, y.dtype) == ((*shape[:-1], 8), dtype)


def test_a_new_layer_has_torch_s_random_weights_rounded(where):
    torch.manual_seed(3)
    linear = torch.nn.Linear(45, 9, device=where)
    torch.manual_seed(3)
    layer = MXFP4Linear(45, 9, device=where, scale_rule="ceil", tie_rule="zero")
    codes, scales = mxfp4.quantize(linear.weight, "ceil", "zero")
    assert same_bits(layer.codes, codes)
    assert same_bits(layer.scales, scales)
    assert same_bits(layer.bias, linear.bias.detach())
    assert not torch.equal(scales, mxfp4.quantize(linear.weight)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear_leaves_its_argument_alone(where, dtype):
    linear = torch.nn.Linear(64, 9, device=where, dtype=dtype)
    before = copy.deepcopy(linear)
    layer = MXFP4Linear.from_linear(linear, scale_rule="rceil")
    layer.bias.zero_()
    assert same_state(linear, before)
    assert same_bits(layer.scales, mxfp4.quantize(linear.weight, "rceil")[1])


def test_its_weight_can_be_looked_at(where):
    linear = torch.nn.Linear(45, 9, device=where, dtype=torch.float16)
    layer = MXFP4Linear.from_linear(linear)
    assert same_bits(layer.weight, mxfp4.dequantize(*mxfp4.quantize(linear.weight), torch.float16)[:, :45])
    assert "in_features=45, out_features=9, bias=True, dtype=torch.float16" in repr(layer)


def wanting_gradient():
    return MXFP4Linear(32, 4)(torch.ones(1, 32, requires_grad=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wanting_gradient, "x requires a gradient; call them under torch.no_grad"),
        (lambda: MXFP4Linear(32, 4)(torch.ones(1, 31)), r"x must be \(.., 32\), not \(1, 31\)"),
        (lambda: MXFP4Linear(32, 4)(torch.tensor(1.0)), r"x must be \(.., 32\), not \(\)"),
        (lambda: MXFP4Linear(32, 4)(torch.ones(1, 32).double()), "not torch.float64"),
        (lambda: MXFP4Linear(0, 4), "must be positive, not 0 and 4"),
        (lambda: MXFP4Linear(32, 4, dtype=torch.float64), "not torch.float64"),
        (lambda: MXFP4Linear(32, 4, compute_dtype=torch.float32), "compute_dtype must be"),
        (lambda: MXFP4Linear(32, 4, scale_rule="round"), "no scale rule 'round'"),
        (lambda: MXFP4Linear.from_linear(torch.nn.Embedding(4, 32)), "takes a torch.nn.Linear, not Embedding"),
        (lambda: MXFP4Linear.from_quantized(mxfp4.quantize(torch.ones(4, 64)), in_features=32), "give 33 to 64"),
        (lambda: MXFP4Linear.from_quantized(mxfp4.quantize(torch.ones(4, 64)), torch.ones(5)), r"bias must be \(4,\)"),
        (lambda: MXFP4Linear.from_quantized(mxfp4.quantize(torch.ones(2, 4, 64))), r"codes are \(N, K/2\)"),
        (lambda: MXFP4Linear.from_quantized(Quantized(torch.ones(4, 16), torch.ones(4, 1))), "must be uint8"),
    ],
)
def test_what_a_linear_layer_refuses(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_an_input_that_wants_a_gradient_works_without_gradients(where):
    layer, x = MXFP4Linear(32, 4, device=where), torch.ones(1, 32, device=where, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).shape == (1, 4)


# An embedding


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("K", [64, 45])
def test_an_embedding_gives_rows_of_its_decoded_table(where, K, dtype):
    source = torch.nn.Embedding(19, K, device=where, dtype=dtype)
    layer = MXFP4Embedding.from_embedding(source)
    table = mxfp4.dequantize(*mxfp4.quantize(source.weight), dtype)[:, :K]
    for ids in (torch.tensor([[0, 18, 3], [3, 3, 1]]), torch.tensor(7, dtype=torch.int32), torch.arange(8)[::2]):
        assert same_bits(layer(ids.to(where)), table[ids.long().to(where)])
    assert same_bits(layer.weight, table)
    assert layer(torch.empty(2, 0, dtype=torch.int64, device=where)).shape == (2, 0, K)


def test_a_padding_row_is_what_it_is_in_torch(where):
    fresh = MXFP4Embedding(6, 32, padding_idx=-2, device=where)
    assert fresh.padding_idx == 4
    assert not fresh(torch.tensor([4], device=where)).any()
    trained = torch.nn.Embedding.from_pretrained(torch.ones(6, 32, device=where), padding_idx=4)
    ids = torch.tensor([4], device=where)
    assert same_bits(MXFP4Embedding.from_embedding(trained)(ids), trained(ids))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MXFP4Embedding(4, 32)(torch.tensor([4])), r"ids\[0\] is 4, the vocabulary has 4 ids"),
        (lambda: MXFP4Embedding(4, 32)(torch.tensor([-1])), r"ids\[0\] is -1"),
        (lambda: MXFP4Embedding(4, 32)(torch.tensor([1.0])), "must be int32 or int64"),
        (lambda: MXFP4Embedding(4, 0), "must be positive"),
        (lambda: MXFP4Embedding(4, 32, 4), "padding_idx is 4, the table has 4 rows"),
        (lambda: MXFP4Embedding.from_embedding(torch.nn.Linear(2, 2)), "takes a torch.nn.Embedding, not Linear"),
        (lambda: MXFP4Embedding.from_embedding(torch.nn.Embedding(2, 2, max_norm=1.0)), "max_norm"),
    ],
)
def test_what_an_embedding_refuses(call, message):
    with pytest.raises(UserError, match=message):
        call()
