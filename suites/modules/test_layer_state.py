"""Layers have torch's habits: casts, copies and checkpoints change no bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mxharness.errors import UserError
from mxharness.nn import MXFP4Embedding, MXFP4Linear

from .layers import same_state, through_torch

LAYERS = {"linear": lambda: MXFP4Linear(45, 9), "embedding": lambda: MXFP4Embedding(9, 45)}
CASTS = {
    torch.float16: lambda layer: layer.half(),
    torch.bfloat16: lambda layer: layer.bfloat16(),
    torch.float32: lambda layer: layer.half().float(),
    torch.float64: lambda layer: layer.type(torch.float64).to(torch.float16),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("to", CASTS)
def test_a_cast_changes_the_dtype_and_no_bit(kind, to):
    layer = LAYERS[kind]()
    before = copy.deepcopy(layer)
    cast = CASTS[to](layer)
    assert cast is layer
    assert layer.dtype == layer.weight.dtype == (torch.float16 if to == torch.float64 else to)
    assert same_state(layer, before)
    assert torch.equal(layer.weight.float(), before.weight.to(layer.dtype).float())


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_have_the_same_bits_and_their_own_memory(kind, where):
    layer = LAYERS[kind]().to(where)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301  our own bytes
        assert same_state(layer, other)
        assert repr(other) == repr(layer)
        assert other.codes.data_ptr() != layer.codes.data_ptr()


def through_safetensors(state, folder):
    safetensors = pytest.importorskip("safetensors.torch", reason="not tried: a state_dict through safetensors")
    safetensors.save_file(state, folder / "state.safetensors")
    return safetensors.load_file(folder / "state.safetensors")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
def test_a_saved_state_loads_bit_for_bit(kind, through, where, tmp_path):
    saved, loaded = LAYERS[kind]().to(where), LAYERS[kind]().to(where)
    assert not same_state(saved, loaded)
    loaded.load_state_dict(through(saved.state_dict(), tmp_path), strict=True)
    assert same_state(saved, loaded)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_float_checkpoint_is_refused_and_says_what_to_do(kind, strict):
    layer = LAYERS[kind]()
    with pytest.raises(UserError, match=r"'weight' is a float weight .* load the checkpoint into the float model"):
        layer.load_state_dict({"weight": torch.ones(9, 45), "bias": torch.ones(9)}, strict=strict)
    state = layer.state_dict()
    with pytest.raises(UserError, match=r"'codes' must be torch\.uint8, the checkpoint has torch\.float32"):
        layer.load_state_dict({**state, "codes": state["codes"].float()})
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        layer.load_state_dict({**state, "scales": state["scales"][:3]})
    with pytest.raises(RuntimeError, match=r'Missing key.* "scales"'):
        layer.load_state_dict({name: tensor for name, tensor in state.items() if name != "scales"})
