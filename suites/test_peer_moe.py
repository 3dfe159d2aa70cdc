"""Mixture of experts against transformers' gpt-oss: router, experts and activation on tiny random configurations.

In float64, with our decoded weights, transformers computes what our reference does, and the kernels stay within the
reference's bounds of transformers' numbers. In 16 bits the kernels are nearer to these than transformers itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mxharness import golden, mxfp4, regimes
from mxharness.execution import execute
from mxharness.judge import judge
from mxharness.op import Case
from mxharness.ops import find

CASES = [
    Case("moe_forward", (T, E, 64, 64), dtype=dtype, options=("k=4",))
    for T, E in ((40, 8), (20, 32), (20, 128))
    for dtype in ("bf16", "fp16")
]
pytestmark = pytest.mark.long("transformers")
"""Which takes long to import."""
EXACT = 1e-10
"""Of the largest element: what float64 may lose in another order of sums."""


def theirs(case, inputs):
    """GptOssMLP in float64 with our decoded weights."""
    modeling = pytest.importorskip(
        "transformers.models.gpt_oss.modeling_gpt_oss", reason="transformers is not installed; not compared: its MoE"
    )
    _, E, H, width = case.shape
    mlp = modeling.GptOssMLP(
        modeling.GptOssConfig(hidden_size=H, intermediate_size=width, num_local_experts=E, num_experts_per_tok=4)
    )
    values = {
        "router.weight": inputs["router_weight"],
        "router.bias": inputs["router_bias"],
        "experts.gate_up_proj": decoded(inputs, "gate_up").mT,
        "experts.gate_up_proj_bias": inputs["gate_up_bias"],
        "experts.down_proj": decoded(inputs, "down").mT,
        "experts.down_proj_bias": inputs["down_bias"],
    }
    mlp.double().load_state_dict({name: value.double() for name, value in values.items()})
    return mlp.requires_grad_(requires_grad=False)


def decoded(inputs, name):
    return golden.decode(mxfp4.unpack(inputs[f"{name}_codes"]), inputs[f"{name}_scales"])


def near(ours, peers):
    return bool((ours - peers).abs().max() <= EXACT * peers.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_computes_what_our_reference_does(case):
    op, router = find("moe_forward"), find("moe_router")
    inputs = op.make_inputs(case)
    mlp = theirs(case, inputs)
    mlp.experts.alpha = float(torch.tensor(mlp.experts.alpha))  # a kernel's argument is float32
    _, weights, ids = mlp.router(inputs["x"].double())
    y, _ = mlp(inputs["x"].double().unsqueeze(0))
    routed = router.composed(replace(case, op="moe_router", shape=case.shape[:3]), inputs)
    assert torch.equal(routed["ids"].value.long(), ids)
    assert near(routed["weights"].value, weights)
    assert near(op.composed(case, inputs)["y"].value, y[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_within_the_bounds_of_transformers_numbers(case, device):
    """The whole function, and the activation of the kernel's own gate_up."""
    op = find("moe_forward")
    inputs = op.make_inputs(case)
    mlp = theirs(case, inputs)
    execution = execute(op, case, device, inputs)
    peers = {
        "composed": {"y": mlp(inputs["x"].double().unsqueeze(0))[0][0]},
        "bound": {"h": mlp.experts._apply_gate(execution.outputs["gate_up"].double())},
    }
    for gate, reference in (("composed", op.composed), ("bound", op.golden)):

        def peers_values(case, tensors, reference=reference, values=peers[gate]):
            ours = reference(case, tensors)
            return {**ours, **{name: replace(ours[name], value=value) for name, value in values.items()}}

        against = replace(op, golden=peers_values, composed=peers_values)
        outcome = judge(against, case, gate, device.device_class, inputs, execution)
        assert outcome.passed, outcome.message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_nearer_to_float64_than_transformers_in_16_bits(case, device):
    """Root mean square over the tokens that both send to the same experts, from biases that 16 bits hold."""
    op = find("moe_forward")
    dtype = regimes.DTYPES[case.dtype]
    inputs = {
        name: tensor.to(dtype).float() if name.endswith("bias") else tensor
        for name, tensor in op.make_inputs(case).items()
    }
    mlp = theirs(case, inputs)
    exact = mlp(inputs["x"].double().unsqueeze(0))[0][0]
    mlp = mlp.to(dtype)
    their_ids = mlp.router(inputs["x"])[2]
    peers = mlp(inputs["x"].unsqueeze(0))[0][0]
    found = execute(op, case, device, inputs).outputs
    same = (found["ids"] == their_ids).all(-1)
    assert same.double().mean() > 0.5
    ours, transformers = (float((y.double() - exact)[same].square().mean().sqrt()) for y in (found["y"], peers))
    assert 0 < ours < transformers
