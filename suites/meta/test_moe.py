"""Tokens side by side by expert, exactly; what the listed cases must be for their bounds to hold; what is refused."""

from __future__ import annotations

import pytest
import torch
from mxharness.errors import UserError
from mxharness.execution import Fenced
from mxharness.functional import moe_forward, moe_router
from mxharness.functional.common import ACTIVATIONS
from mxharness.functional.dispatch import GATED, Problem, choose
from mxharness.functional.moe import group, moe_stages
from mxharness.mxfp4 import Quantized, quantize
from mxharness.ops import find


def tokens_by_expert(ids, experts):
    """The definition: entries of expert after expert, ascending, and where each expert's begin."""
    flat = ids.flatten().tolist()
    lists = [[entry for entry, id_ in enumerate(flat) if id_ == expert] for expert in range(experts)]
    ends = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return ends.int(), torch.tensor([entry for own in lists for entry in own], dtype=torch.int32)


@pytest.mark.parametrize("experts", [1, 3, 32, 128])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (127, 1), (128, 1), (43, 3), (600, 4)])
def test_entries_are_grouped_by_expert(device, shape, experts):
    generator = torch.Generator().manual_seed(experts)
    for ids in (
        torch.randint(0, experts, shape, generator=generator),
        torch.full(shape, experts - 1),
        torch.zeros(shape),
        torch.randint(0, (experts + 1) // 2, shape, generator=generator) * 2 % experts,  # odd experts are empty
    ):
        fenced = Fenced(device)
        got = group(fenced, fenced.upload(ids.int()), experts)
        assert [tensor.tolist() for tensor in got] == [tensor.tolist() for tensor in tokens_by_expert(ids, experts)]
        assert fenced.violations() == []


@pytest.mark.parametrize("case", find("moe_forward").cases, ids=str)
def test_no_listed_case_hangs_on_rounded_logits(case):
    """Every token's experts are certain, so that the whole function has a bound for every token."""
    op = find("moe_forward")
    assert op.composed is not None
    expected = op.composed(case, op.make_inputs(case))["y"]
    assert not expected.slack.isinf().any()


def test_cases_meet_both_sides_of_the_limit_and_empty_experts(outputs):
    op = find("moe_forward")
    case = next(case for case in op.cases if case.shape[:2] == (70, 32))
    found = outputs(op, case, op.make_inputs(case))
    gate, up = found["gate_up"][..., 0::2], found["gate_up"][..., 1::2]
    for beyond in (gate > 7, gate < -7, up > 7, up < -7):
        assert 0.01 < beyond.double().mean() < 0.2
    crowded = next(case for case in op.cases if "crowded" in case.options)
    assert outputs(op, crowded, op.make_inputs(crowded))["ids"].unique().tolist() == [3, 4, 5]


def arguments(T=3, E=4, H=64, I=32, dtype=torch.bfloat16):  # noqa: E741  the shape alphabet
    generator = torch.Generator().manual_seed(0)

    def weight(N, K):
        codes, scales = quantize(torch.randn(E * N, K, generator=generator))
        return Quantized(codes.view(E, N, -1), scales.view(E, N, -1))

    return {
        "x": torch.randn(T, H, generator=generator).to(dtype),
        "router_weight": torch.randn(E, H, generator=generator).to(dtype),
        "router_bias": torch.randn(E, generator=generator),
        "gate_up": weight(2 * I, H),
        "gate_up_bias": torch.randn(E, 2 * I, generator=generator),
        "down": weight(H, I),
        "down_bias": torch.randn(E, H, generator=generator),
    }


def cut(weight, rows):
    return Quantized(weight.codes[:, :rows].contiguous(), weight.scales[:, :rows].contiguous())


def moved(given, device):
    def move(value):
        if isinstance(value, Quantized):
            return Quantized(*map(move, value))
        return value.to(device.torch_device, copy=False) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in given.items()}


WIDTH = "x must be (T, H) with H a multiple of 32"
REFUSED = {
    "no tokens": (lambda a: {"x": a["x"][:0]}, "x must be (M, K) with at least one row"),
    "width of x": (lambda a: {"x": torch.zeros(3, 48, dtype=torch.bfloat16)}, WIDTH),
    "float32": (lambda a: {"x": a["x"].float()}, "x must be bfloat16 or float16, not torch.float32"),
    "strided": (lambda a: {"x": a["x"].mT.contiguous().mT}, "x must be contiguous"),
    "router's dtype": (lambda a: {"router_weight": a["router_weight"].half()}, "the router's weight must be (E, 64)"),
    "too many experts": (
        lambda a: {"router_weight": torch.zeros(257, 64, dtype=torch.bfloat16)},
        "with E from 1 to 256, not (257, 64)",
    ),
    "router's bias": (lambda a: {"router_bias": a["router_bias"][:3]}, "the router's bias must be float32 of shape"),
    "k of 0": (lambda a: {"k": 0}, "k must be from 1 to 4 for 4 experts, not 0"),
    "k past the experts": (lambda a: {"k": 5}, "k must be from 1 to 4 for 4 experts, not 5"),
    "width of an expert": (
        lambda a: {"down": Quantized(a["down"].codes[..., :8].contiguous(), a["down"].scales)},
        "down codes must be (E, N, K/2)",
    ),
    "odd gate_up": (lambda a: {"gate_up": cut(a["gate_up"], 63)}, "gate_up must be (E, 2I, H) and down (E, H, I)"),
    "fewer experts": (lambda a: {"down": Quantized(*(t[:3] for t in a["down"]))}, "with E = 4 as the router"),
    "gate_up_bias": (lambda a: {"gate_up_bias": a["gate_up_bias"].double()}, "gate_up_bias must be float32"),
    "down_bias": (lambda a: {"down_bias": a["down_bias"][0]}, "down_bias must be float32 of shape (4, 64)"),
    "limit": (lambda a: {"limit": float("nan")}, "limit"),
    "alpha": (lambda a: {"alpha": float("inf")}, "alpha"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_before_any_launch(device, name):
    change, message = REFUSED[name]
    given = arguments()
    fenced = Fenced(device)
    with pytest.raises(UserError) as raised:
        moe_forward(**moved({**given, **change(given)}, device), device=fenced)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert fenced.launches == 0


def test_public_functions_return_the_stages_that_are_judged(device):
    """On the device where the tensors lie, with k = 4 and gpt-oss' activation unless told otherwise."""
    given = moved(arguments(), device)
    stages = moe_stages(**given, k=4, alpha=1.702, limit=7.0, device=device)
    assert torch.equal(moe_forward(**given), stages["y"])
    router = moe_router(given["x"], given["router_weight"], given["router_bias"])
    assert all(torch.equal(*pair) for pair in zip(router, list(stages.values())[:3], strict=True))
    assert (stages["weights"].sum(-1) - 1).abs().max() < 2**-22


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 12, 150, 700])
def test_the_layer_has_the_bits_of_its_stages(device, dtype, T):
    """The product that goes into SwiGLU is not written where its kernel can take it."""
    given = moved(arguments(T, E=3, H=96, I=64, dtype=dtype), device)
    launches, results = [], []
    for forward in (moe_forward, moe_stages):
        fenced = Fenced(device)
        results.append(forward(**given, k=2, device=fenced))
        launches.append(fenced.launches)
        assert fenced.violations() == []
    y, stages = results
    assert torch.equal(y.view(torch.int16), stages["y"].view(torch.int16))
    assert stages["gate_up"].shape == (T, 2, 128)
    kind = ACTIVATIONS[dtype]
    chosen = choose(Problem("gemm", kind, 128, 2 * T, 3, routed=True, K=96), device.device_class)
    assert launches[0] == launches[1] - (chosen.source in GATED)


@pytest.mark.parametrize("T", [1, 16, 256, 2048])
@pytest.mark.parametrize("experts", [32, 128])
def test_layers_of_gpt_oss_do_not_write_what_goes_into_swiglu(experts, T):
    problem = Problem("gemm", "bf16", 5760, 4 * T, experts, routed=True, K=2880)
    assert choose(problem, "sm_90").source in GATED
