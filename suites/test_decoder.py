"""The decoder on the kernels: as near to float64 as its precision allows, and the same bits however it is asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.model import config as models
from mxharness.model import decoder, reference, toy
from mxharness.model.config import ModelConfig
from mxharness.mxfp4 import Quantized

NAMES = list(toy.CONFIGS)
IDS = torch.randint(259, (2, 40), generator=torch.Generator().manual_seed(0))


def decoded(checkpoint, dtype):
    """The values of the kernels' weights."""
    values = {}
    for weight in models.weights(checkpoint.config):
        stored = checkpoint.tensors[weight.name].read()
        if weight.packed:
            stored = mxfp4.dequantize(*(stored if isinstance(stored, Quantized) else mxfp4.quantize(stored)))
        values[weight.name] = stored.to(dtype)
    return values


def torch_logits(checkpoint, dtype, ids=IDS):
    """Logits (R, vocabulary) of the torch decoder, every operation of which rounds to dtype."""
    weights, config = decoded(checkpoint, dtype), checkpoint.config
    states = reference.hidden_states(config, weights, ids)
    return reference.logits(config, weights, states).flatten(0, 1).double()


def kernel_logits(runner, ids=IDS):
    return runner.logits(runner.hidden_states(ids).flatten(0, 1)).cpu()


@pytest.mark.parametrize("activations", decoder.ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_nearer_to_float64_than_torch_in_the_same_precision(device, name, activations):
    """A bound through layers of worst cases bounds nothing: the yardstick is a trusted run that rounds as often."""
    checkpoint = toy.checkpoint(toy.CONFIGS[name])
    exact = torch_logits(checkpoint, torch.float64)
    trusted = (torch_logits(checkpoint, decoder.STORAGE[activations]) - exact).norm(dim=1)
    error = (kernel_logits(decoder.kernels(checkpoint, device, activations)).double() - exact).norm(dim=1)
    assert error.norm() <= trusted.norm()
    assert error.median() <= trusted.median()  # of which a token that is sent to other experts is no part
    assert error.norm() <= {"fp16": 2.0**-7, "bf16": 2.0**-4}[activations] * exact.norm()


@pytest.mark.parametrize("kv", [None, "mxfp4"])
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_how_tokens_are_grouped(device, name, kv):
    """All at once, in pieces and one by one, alone and in a batch, at positions of their own."""
    model = decoder.build(toy.checkpoint(toy.CONFIGS[name]), device, "bf16")
    ids = device.upload(IDS)

    def states(rows, cuts):
        caches = decoder.caches(model, len(rows), 64, kv)
        parts = []
        for first, last in pairwise(cuts):
            starts = device.upload(torch.full((len(rows),), first, dtype=torch.int32))
            parts.append(decoder.step(model, rows[:, first:last].contiguous(), caches, starts))
        return torch.cat(parts, dim=1)

    whole = states(ids, [0, 40])
    assert torch.isfinite(whole).all()
    assert torch.equal(states(ids, [0, 9, 34, *range(35, 41)]), whole)
    assert torch.equal(states(ids[1:].clone(), [0, 40]), whole[1:])
    if kv is None:
        assert torch.equal(decoder.runner(model).hidden_states(IDS), whole)


def test_positions_nobody_looks_at_give_the_same_bits(device):
    model = decoder.build(toy.checkpoint(toy.GPT_OSS), device)
    starts = device.upload(torch.zeros(2, dtype=torch.int32))
    ids = device.upload(IDS)
    looked, unlooked = (
        decoder.step(model, ids, decoder.caches(model, 2, 40), starts, validate=validate) for validate in (True, False)
    )
    assert torch.equal(looked, unlooked)
    with pytest.raises(UserError, match="room for 39 positions"):
        decoder.step(model, ids, decoder.caches(model, 2, 39), starts)
    with pytest.raises(UserError, match="must not be negative"):
        decoder.step(model, ids, decoder.caches(model, 2, 40), starts - 1)
    with pytest.raises(UserError, match="vocabulary"):
        decoder.step(model, ids + 259, decoder.caches(model, 2, 40), starts)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_on_the_device_in_their_bytes(device, name):
    """MXFP4 as stored or quantised by the rules asked for; nothing is held twice."""
    checkpoint = toy.checkpoint(toy.CONFIGS[name])
    model = decoder.build(checkpoint, device, "bf16", "rceil", "away")
    config = checkpoint.config
    names = {weight.name: weight for weight in models.weights(config)}
    packed = sum(mxfp4.nbytes(weight.shape) for weight in names.values() if weight.packed)
    plain = [weight for weight in names.values() if not weight.packed]
    wide = sum(torch.Size(weight.shape).numel() for weight in plain) * 4
    routers = sum(torch.Size(weight.shape).numel() for weight in plain if weight.name.endswith("router")) * 2
    angles = config.context * config.head_size * 4
    assert model.nbytes == packed + wide - routers + angles
    wanted = mxfp4.quantize(checkpoint.tensors["layers.1.v"].read(), "rceil", "away")
    rows = config.kv_heads * config.head_size
    assert torch.equal(model.layers[1].qkv.codes[-rows:].cpu(), wanted.codes)
    assert torch.equal(model.layers[1].qkv.scales[-rows:].cpu(), wanted.scales)
    if config.experts:
        stored = checkpoint.tensors["layers.1.down"].read()
        assert torch.equal(model.layers[1].ffn.down.codes.cpu(), stored.codes)
        assert model.words == "mxfp4 (as stored), mxfp4 (rceil, away)"
    else:
        assert model.words == "mxfp4 (rceil, away)"


def test_a_runner_says_what_it_is(device):
    runner = decoder.kernels(toy.checkpoint(), device)
    told = (runner.name, runner.activations, runner.arithmetic, runner.device_class, runner.config)
    assert told == ("kernels", "fp16", device.arithmetic, device.device_class, toy.LLAMA)
    states = runner.hidden_states(IDS)
    assert (states.shape, states.dtype) == ((2, 40, 64), torch.float16)
    assert runner.logits(states[0]).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(toy.LLAMA, head_size=16), "heads of 16; the kernels take 32"),
        (replace(toy.LLAMA, kv_heads=3), "4 heads cannot share 3"),
        (replace(toy.LLAMA, ffn=80), "layers.0.down has rows of 80; the kernels take a multiple of 32"),
        (replace(toy.GPT_OSS, hidden=72), "embedding has rows of 72"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(device, config: ModelConfig, message):
    with pytest.raises(UserError, match=message):
        decoder.build(toy.checkpoint(config), device)


def test_what_does_not_fit_is_refused(device):
    with pytest.raises(UserError, match="no activations 'fp32'; there are fp16, bf16"):
        decoder.build(toy.checkpoint(), device, "fp32")
    with pytest.raises(UserError, match="no rule"):
        decoder.build(toy.checkpoint(), device, scale_rule="nearest")
    runner = decoder.kernels(toy.checkpoint(), device)
    with pytest.raises(UserError, match="129 tokens does not fit the model's context of 128"):
        runner.hidden_states(torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(UserError, match="0 to 258"):
        runner.hidden_states(torch.tensor([[259]]))
