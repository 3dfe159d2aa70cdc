"""Layers of models as others wrote them: torch's functions and transformers' modules, on our decoded weights.

In float64 a peer computes what our reference does; and the kernels stay within the reference's bounds of the peer's
numbers. A peer that is not installed is a skip that names the comparison that did not happen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mxharness import golden, mxfp4
from mxharness.execution import execute
from mxharness.judge import judge
from mxharness.ops import ffn, find, norm, swiglu
from torch.nn import functional

EXACT = 1e-11
"""Of the largest element: what float64 may lose in another order of sums."""


def cases(name, *regimes):
    return [case for case in find(name).cases if case.regime in regimes and case.shape[0] < 100]


def transformers(module, comparison):
    return pytest.importorskip(
        f"transformers.models.{module}", reason=f"transformers is not installed; not compared: {comparison}"
    )


def decoded(inputs, name):
    return golden.decode(mxfp4.unpack(inputs[f"{name}_codes"]), inputs[f"{name}_scales"])


def float32(number):
    """As a kernel gets it."""
    return float(torch.tensor(number))


def distance(ours, peers):
    """The largest, of the largest element of the peer's."""
    assert peers.dtype == torch.float64
    return float((ours - peers).abs().max() / peers.abs().max())


def against(op, gate, values):
    """The operator, judged by the reference's bounds around a peer's values."""
    ours = op.composed if gate == "composed" else op.golden

    def reference(case, tensors):
        expected = ours(case, tensors)
        return {**expected, **{name: replace(expected[name], value=value) for name, value in values.items()}}

    return replace(op, golden=reference, composed=reference)


def check(op, case, gate, device, inputs, execution, values):
    outcome = judge(against(op, gate, values), case, gate, device.device_class, inputs, execution)
    assert outcome.passed, outcome.message


# Norms ---------------------------------------------------------------------------------------------------------

NORMS = [case for name in ("rms_norm", "layer_norm") for case in cases(name, "normal", "offset", "small")]


def torch_norm(case, s, inputs):
    eps, K = float32(norm.eps_of(case)), s.shape[1]
    weight, bias = inputs["weight"].double(), inputs.get("bias")
    if case.op == "rms_norm":
        return functional.rms_norm(s.double(), (K,), weight, eps)
    return functional.layer_norm(s.double(), (K,), weight, None if bias is None else bias.double(), eps)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_torch_norms(case, device):
    """With a residual, of the sum that the kernel made."""
    op = find(case.op)
    inputs = op.make_inputs(case)
    execution = execute(op, case, device, inputs)
    s = execution.outputs.get("sum", inputs["x"])
    peers = torch_norm(case, s, inputs)
    assert distance(op.golden(case, {**execution.outputs, **inputs})["y"].value, peers) < EXACT
    check(op, case, "bound", device, inputs, execution, {"y": peers})


@pytest.mark.long("transformers")
def test_llama_rms_norm(device):
    """It computes in float32 whatever it is given: K + 8 roundings of a sum of squares at most, halved by the root."""
    llama = transformers("llama.modeling_llama", "RMSNorm")
    op = find("rms_norm")
    for case in cases("rms_norm", "normal", "outliers"):
        if "residual" in case.options:
            continue
        inputs = op.make_inputs(case)
        K = case.shape[1]
        theirs = llama.LlamaRMSNorm(K, eps=float32(norm.eps_of(case)))
        theirs.load_state_dict({"weight": inputs["weight"]})
        peers = theirs(inputs["x"].float()).detach().double()
        assert distance(op.golden(case, inputs)["y"].value, peers) < (K + 8) / 2 * 2.0**-24
        execution = execute(op, case, device, inputs)
        unit = {"bf16": 2.0**-8, "fp16": 2.0**-11}[case.dtype]
        assert distance(execution.outputs["y"].double(), peers) < unit + (K + 8) * 2.0**-24


# Feed-forward layers -------------------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
LAYERS = [
    case
    for name in ("ffn_forward", "ffn_forward_bias", "swiglu_ffn_forward", "ffn_residual")
    for case in cases(name, "normal", "outliers")
]


def gelu_form(case):
    return next(form for name, form in ACTIVATIONS.items() if name in case.options)


def torch_layer(case, x, inputs):
    """Torch's own functions, one after another; the gated layer is transformers' LlamaMLP."""
    if "gate_codes" in inputs:
        return llama_mlp(case)(x, inputs)
    up, down = (inputs[name].double() if name in inputs else None for name in ("up_bias", "down_bias"))
    hidden = functional.gelu(functional.linear(x, decoded(inputs, "up"), up), approximate=gelu_form(case))
    return functional.linear(hidden, decoded(inputs, "down"), down)


def llama_mlp(case):
    llama = transformers("llama.modeling_llama", "the SwiGLU layer")
    _, K, width = case.shape

    def run(x, inputs):
        mlp = llama.LlamaMLP(llama.LlamaConfig(hidden_size=K, intermediate_size=width, hidden_act="silu")).double()
        mlp.load_state_dict({f"{name}_proj.weight": decoded(inputs, name) for name in ("gate", "up", "down")})
        return mlp(x).detach()

    return run


def peers_of(case, inputs):
    x = inputs["x"].double()
    if case.op != "ffn_residual":
        return torch_layer(case, x, inputs)
    s = x + inputs["residual"].double() if "residual" in inputs else x
    shape, eps, weight = (s.shape[1],), float32(ffn.EPS), inputs["norm_weight"].double()
    if "layer" in case.options:
        normed = functional.layer_norm(s, shape, weight, inputs["norm_bias"].double(), eps)
    else:
        normed = functional.rms_norm(s, shape, weight, eps)
    return s + torch_layer(case, normed, inputs)


@pytest.mark.long("transformers")
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_feed_forward_layers(case, device):
    """The whole layer, and the activation of what the kernel itself projected."""
    op = find(case.op)
    inputs = op.make_inputs(case)
    execution = execute(op, case, device, inputs)
    peers = peers_of(case, inputs)
    assert distance(op.composed(case, inputs)["y"].value, peers) < EXACT
    check(op, case, "composed", device, inputs, execution, {"y": peers})
    up = execution.outputs["up"].double()
    if "gate" in execution.outputs:
        activated = functional.silu(execution.outputs["gate"].double()) * up
    else:
        activated = functional.gelu(up, approximate=gelu_form(case))
    check(op, case, "bound", device, inputs, execution, {"activated": activated})


@pytest.mark.long("transformers")
def test_gpt2_mlp(device):
    """Both projections with a bias around the tanh form, in a module that holds its weights transposed."""
    gpt2 = transformers("gpt2.modeling_gpt2", "a layer with biases")
    op = find("ffn_forward_bias")
    for case in cases("ffn_forward_bias", "normal", "outliers"):
        inputs = op.make_inputs(case)
        _, K, width = case.shape
        form = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[case.options[0]]
        mlp = gpt2.GPT2MLP(width, gpt2.GPT2Config(n_embd=K, activation_function=form, resid_pdrop=0.0)).double()
        mlp.load_state_dict(
            {
                "c_fc.weight": decoded(inputs, "up").mT,
                "c_fc.bias": inputs["up_bias"].double(),
                "c_proj.weight": decoded(inputs, "down").mT,
                "c_proj.bias": inputs["down_bias"].double(),
            }
        )
        peers = mlp(inputs["x"].double()).detach()
        assert distance(op.composed(case, inputs)["y"].value, peers) < EXACT
        check(op, case, "composed", device, inputs, execute(op, case, device, inputs), {"y": peers})


@pytest.mark.long("transformers")
@pytest.mark.parametrize("case", cases("swiglu", "normal", "limits"), ids=str)
def test_gpt_oss_activation(case, device):
    modeling = transformers("gpt_oss.modeling_gpt_oss", "the limited SwiGLU")
    op = find("swiglu")
    inputs = op.make_inputs(case)
    experts = modeling.GptOssExperts(
        modeling.GptOssConfig(hidden_size=8, intermediate_size=case.shape[1], num_local_experts=1)
    )
    assert (experts.alpha, experts.limit) == (1.702, 7.0)
    name = next(name for name in swiglu.SETTINGS if name in case.options)
    experts.alpha, experts.limit = map(float32, swiglu.SETTINGS[name])
    x = inputs["x"].double()
    pairs = torch.stack(x.chunk(2, 1), 2).flatten(1) if "halves" in case.options else x
    peers = experts._apply_gate(pairs)
    assert distance(op.golden(case, inputs)["y"].value, peers) < EXACT
    check(op, case, "bound", device, inputs, execute(op, case, device, inputs), {"y": peers})
