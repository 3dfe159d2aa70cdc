"""Names of other libraries: the same things, and sentences for what MXFP4 does not have."""

from __future__ import annotations

import re

import pytest
import torch
from mxharness import compat, mxfp4
from mxharness.errors import UserError
from mxharness.nn import MXFP4Linear

from .layers import Tied, same_bits


def test_other_libraries_names_are_the_same_things(where, capsys):
    assert compat.MXLinear is MXFP4Linear
    quantizer = compat.MXFP4Quantizer(block_size=32, scale_format="e8m0")
    weight = torch.randn(9, 45, device=where)
    packed, scales = quantizer.quantize(weight)
    assert same_bits(packed, mxfp4.quantize(weight)[0])
    back = quantizer.dequantize(packed, scales, weight.shape)
    assert same_bits(back, mxfp4.dequantize(packed, scales)[:, :45])
    assert quantizer.dequantize(packed, scales).shape == (9, 64)
    x = torch.randn(3, 45, device=where)
    layer = torch.nn.Linear(45, 9, bias=False, device=where)
    layer.weight.data = weight
    assert same_bits(compat.quant_matmul(x, packed, scales), MXFP4Linear.from_linear(layer)(x))
    model = Tied()
    assert len(compat.quantize_model_mxfp4(model, block_size=32, skip="layers").replaced) == 2
    compat.print_architecture_info()
    assert re.search(r"^Class: +(host|sm_\d+)$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compat.MXFP4Quantizer(block_size=16), "blocks of 32 elements .*, not 16"),
        (lambda: compat.MXFP4Quantizer(scale_format="bf16"), "e8m0 scales .*, not 'bf16'"),
        (lambda: compat.quantize_model_mxfp4(Tied(), block_size=64), "not 64"),
        (
            lambda: compat.MXFP4Quantizer().dequantize(*mxfp4.quantize(torch.ones(2, 32)), (3, 32)),
            r"not those of a tensor \(3, 32\)",
        ),
        (lambda: compat.benchmark_linear_layers(32, 32, 32, 1, 0), "num_iterations must be at least 1"),
        (lambda: compat.benchmark_linear_layers(32, 32, 32, 1, 1.5), r"num_iterations must be an integer, not 1\.5"),
        (lambda: compat.benchmark_linear_layers(32, "a", 32, 1, 1), "hidden_size must be an integer, not 'a'"),
        (lambda: compat.benchmark_linear_layers(32, 32, 32, 1, 1, device="tpu"), "no device 'tpu' on this machine"),
        (lambda: compat.MXFP4Quantizer().quantize(None), r"tensor must be a torch\.Tensor, not NoneType"),
        (lambda: compat.MXFP4Quantizer().quantize(torch.ones(2, 32, device="meta")), "meta device has no values"),
        (lambda: compat.MXFP4Quantizer().dequantize(None, None), r"codes must be a torch\.Tensor, not NoneType"),
        (
            lambda: compat.MXFP4Quantizer().dequantize(*mxfp4.quantize(torch.ones(2, 32)), 64),
            r"shape must be sizes \(\.\., K\), not 64",
        ),
        (lambda: compat.quant_matmul(None, *mxfp4.quantize(torch.ones(2, 32))), "activations must be a torch.Tensor"),
        (lambda: compat.quantization_accuracy(32, 0, 32, 1, 1), "must be positive, not 32, 0, 32 and 1"),
    ],
)
def test_what_other_libraries_promise_and_mxfp4_does_not_have(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_benchmark_and_accuracy_report_what_they_measured(where):
    times = compat.benchmark_linear_layers(64, 96, 33, batch_size=4, num_iterations=3, device=where)
    assert times["speedup"] == times["standard_seconds"] / times["mxfp4_seconds"] > 0
    assert times["standard_bytes"] == 2 * (96 * 64 + 96 + 33 * 96 + 33)
    assert times["mxfp4_bytes"] == mxfp4.nbytes((96, 64)) + mxfp4.nbytes((33, 96)) + 4 * (96 + 33)
    errors = compat.quantization_accuracy(64, 96, 33, batch_size=16, num_tests=3, device=where)
    assert 0 < errors["kernel_error_mean"] <= errors["kernel_error_max"] < 2**-8
    assert 0.09 < errors["quantization_error_mean"] <= errors["quantization_error_max"] < 0.16
    assert not compat.test_quantization_accuracy.__test__
    assert compat.test_quantization_accuracy is compat.quantization_accuracy
