"""An activation behind a layer, experts, and a block of them behind its router."""

from __future__ import annotations

import pytest
import torch
from mxharness.errors import UserError
from mxharness.mxfp4 import Quantized
from mxharness.nn import MXFP4Experts, MXFP4Linear, MXFP4LinearWithActivation, MXFP4MoE, create_quantized_mlp_block

from .layers import HALVES, same_bits, same_state, through_torch


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_layer_with_swiglu_is_gpt_oss_formula(where, dtype):
    layer = MXFP4LinearWithActivation(45, 12, activation="swiglu", swiglu_limit=1.5, device=where)
    x = 2 * torch.randn(3, 5, 45, device=where).to(dtype)
    product = layer.linear(x).double()
    gate, up = product[..., ::2].clamp(max=1.5), product[..., 1::2].clamp(-1.5, 1.5)
    wanted = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    assert float(product.max()) > 1.5
    assert float(product[..., 1::2].min()) < -1.5
    y = layer(x)
    assert (y.shape, y.dtype) == ((3, 5, 6), dtype)
    roundoff = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert bool(((y.double() - wanted).abs() <= roundoff * wanted.abs() + 2**-20).all())
    assert layer(x[:0]).shape == (0, 5, 6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_layer_with_gelu_is_torch_s_gelu(where, activation, dtype):
    layer = MXFP4LinearWithActivation.around(MXFP4Linear(45, 12, device=where), activation=activation)
    x = 2 * torch.randn(3, 5, 45, device=where).to(dtype)
    product = layer.linear(x.bfloat16() if dtype == torch.float32 else x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    wanted = torch.nn.functional.gelu(product.double(), approximate=approximate)
    y = layer(x)
    assert (y.shape, y.dtype) == ((3, 5, 12), dtype)
    assert bool(((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 2**-20).all())
    assert layer(x[:, :0]).shape == (3, 0, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MXFP4LinearWithActivation(32, 4, activation="relu"), "no activation 'relu'; there are swiglu, gelu"),
        (lambda: MXFP4LinearWithActivation(32, 5), "5 out_features are no pairs"),
        (lambda: MXFP4LinearWithActivation(32, 4, swiglu_limit=0.0), "swiglu_limit must be positive"),
        (lambda: MXFP4LinearWithActivation(32, 4)(torch.ones(1, 31)), r"x must be \(.., 32\)"),
        (lambda: MXFP4LinearWithActivation(32, 4, activation="gelu")(torch.ones(1, 31)), r"x must be \(.., 32\)"),
        (lambda: MXFP4Experts(2, 45, 4), "multiple of 32, not 45"),
        (lambda: MXFP4Experts(2, 32, 4, activation="gelu"), "no activation 'gelu'; there are swiglu"),
        (lambda: create_quantized_mlp_block(32, 48, 4, 2), "multiples of 32, not 32 and 48"),
        (lambda: create_quantized_mlp_block(32, 32, 4, 5), "experts_per_token must be"),
        (lambda: MXFP4MoE(*create_quantized_mlp_block(32, 32, 4, 2), 5), "experts_per_token must be"),
        (lambda: MXFP4MoE(torch.nn.Linear(32, 3), MXFP4Experts(4, 32, 64), MXFP4Experts(4, 32, 32), 2), "gate must"),
        (lambda: MXFP4MoE(torch.nn.Linear(32, 4), MXFP4Experts(4, 32, 64), MXFP4Experts(4, 32, 32), 2), "needs swiglu"),
    ],
)
def test_what_activations_and_experts_refuse(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_experts_give_every_expert_s_output(where, dtype):
    experts = MXFP4Experts(3, 64, 20, activation="swiglu", device=where)
    x = torch.randn(2, 5, 64, device=where).to(dtype)
    y = experts(x)
    assert y.shape == (3, 2, 5, 10)
    for e in range(3):
        alone = MXFP4Linear.from_quantized(Quantized(experts.codes[e], experts.scales[e]), experts.bias[e])
        assert same_bits(y[e], MXFP4LinearWithActivation.around(alone)(x))
    assert experts(x[:0]).shape == (3, 0, 5, 10)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_an_mlp_block_is_its_router_and_experts_put_together(where, dtype):
    """Softmax after top-k, over what the experts' modules give alone: the block takes another way to the same value."""
    gate, mlp1, mlp2 = create_quantized_mlp_block(
        64, 32, 6, 2, swiglu_limit=0.25, alpha=0.5, device=where, dtype=torch.float32
    )
    block = MXFP4MoE(gate, mlp1, mlp2, experts_per_token=2)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    x = torch.randn(4, 3, 64, device=where).to(dtype)
    half = x.bfloat16() if dtype == torch.float32 else x
    with torch.no_grad():
        logits = half.double() @ gate.weight.to(half.dtype).double().T + gate.bias.double()
        weights, ids = logits.topk(2)
        outputs = torch.stack([mlp2(one)[e] for e, one in enumerate(mlp1(half))], -2).double()  # (4, 3, E, H)
        chosen = outputs.gather(-2, ids[..., None].expand(-1, -1, -1, 64))
        wanted = (weights.softmax(-1)[..., None] * chosen).sum(-2)
        y = block(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    scale = (weights.softmax(-1)[..., None] * chosen.abs()).sum(-2)
    assert bool(((y.double() - wanted).abs() <= 2**-7 * scale + 2**-20).all())  # outputs above are rounded, then y is
    assert block(x[:0]).shape == (0, 3, 64)


def test_an_mlp_block_is_saved_and_loaded_bit_for_bit(tmp_path):
    saved, loaded = (MXFP4MoE(*create_quantized_mlp_block(64, 32, 4, 2), 2) for _ in range(2))
    loaded.load_state_dict(through_torch(saved.state_dict(), tmp_path), strict=True)
    assert same_state(saved, loaded)
    x = torch.randn(3, 64)
    assert same_bits(saved(x), loaded(x))
