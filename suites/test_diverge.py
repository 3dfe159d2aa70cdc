"""Where a whole model goes wrong: planted faults and spoilt weights must be named where they are, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from mxharness import cli, diverge, faults, functional, launches, watched
from mxharness.commands import perplexity as commands
from mxharness.device import open_device
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.execution import Execution
from mxharness.judge import judge
from mxharness.model import decoder, toy
from mxharness.model.checkpoint import Stored

from .toys import sample

IDS, MANY = ((torch.arange(count) * 5 % 259).view(1, -1) for count in (12, 64))
SAMPLE = sample(4)
ATTENTION = ["attention_norm", "qkv", "kv append", "rope", "attention", "output", "ffn_norm"]
LAYER = {
    "llama": [*ATTENTION, "gate", "up", "swiglu", "down"],
    "gpt-oss": [*ATTENTION, "router", "route", "group", "gate_up", "swiglu", "down", "combine"],
}


@pytest.mark.parametrize("name", toy.CONFIGS)
@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_a_healthy_model_is_judged_launch_by_launch_and_passes(device, name, activations):
    checkpoint = toy.checkpoint(toy.CONFIGS[name])
    report = diverge.run(checkpoint, device, IDS, activations)
    assert report.passed
    assert not report.failure
    order = list(dict.fromkeys((step.place, step.role.partition(",")[0]) for step in report.steps))
    inner = [(f"layer {i}", role) for i in (0, 1) for role in LAYER[name]]
    assert order == [("embedding", "embedding"), *inner, ("final_norm", "final_norm"), ("head", "head")]
    assert all(step.rows[0] == step.rows[1] for step in report.steps)
    assert not any(step.outcome.refused for step in report.steps)
    if device.device_class in ("host", "sm_90"):
        predicted = {step.role.partition(",")[0] for step in report.steps if step.outcome.gate == "predicted"}
        assert predicted == {*LAYER[name], "final_norm", "head"} - {"route", "group", "combine"}
    growth = [each.relative for each in report.growth]
    assert [each.place for each in report.growth] == ["layer 0", "layer 1", "final_norm"]
    unit = 2.0**-11 if activations == "fp16" else 2.0**-8
    assert unit / 4 < growth[0] < growth[-1] < 20 * unit


def test_watching_changes_no_bit(device):
    checkpoint = toy.checkpoint(toy.GPT_OSS)
    model = decoder.build(checkpoint, device)
    seen = []
    shown = watched.Watched(device, lambda launch, addresses: seen.append((launch, addresses)))
    states = decoder.runner(replace(model, device=shown)).hidden_states(IDS)
    assert torch.equal(states, decoder.runner(model).hidden_states(IDS))
    assert torch.equal(seen[-1][0].left["y"], states[0].cpu())
    assert seen[-1][1]["y"] == states.data_ptr()
    append = next(launch for launch, _ in seen if launch.kernel.startswith("kv_append"))
    assert not append.given["k_cache"].any()  # as it was before
    assert append.left["k_cache"].any()


@pytest.mark.parametrize(
    ("fault", "name", "role", "words"),
    [
        ("half-accumulators", "llama", "qkv", "no K block alone, but K blocks 0 to 1 together"),
        ("residual-left-out-of-the-norm", "llama", "ffn_norm", "elements of sum past the bound"),
        ("gate-and-up-swapped", "llama", "swiglu", "elements of y past the bound"),
        ("window-off-by-one", "gpt-oss", "attention", "the last 4 tokens"),
        ("last-slot-dropped", "gpt-oss", "combine", "elements of y past the bound"),
        ("expert-index-off-by-one", "gpt-oss", "route", "of ids"),
        ("bias-of-the-first-expert", "gpt-oss", "gate_up, expert 1", "every element"),
    ],
)
def test_a_planted_fault_is_named(device, fault, name, role, words):
    with faults.planted(faults.select([fault])[0], device.name) as broken:
        report = diverge.run(toy.checkpoint(toy.CONFIGS[name]), broken, IDS)
    assert not report.passed
    assert (report.first.place, report.first.role) == ("layer 0", role)
    assert words in report.first.outcome.message
    assert "paste into" not in report.first.outcome.message


@pytest.mark.parametrize(
    ("old", "new", "role"),
    [
        ("lane] = id_of(mine);", "lane] = id_of(mine) + 1;", "route"),
        ("lane] = id_of(mine);", "lane] = id_of(mine) - 1;", "route"),
        ("at + __popc(mine & ((1u << lane) - 1))", "at", "group"),
        ("= begin + lane;", "= begin;", "group"),
        ("offsets[expert + 1] = count", "offsets[expert + 1] = count + 1", "group"),
        ("offsets[expert] = offset", "offsets[expert] = expert == 0 ? 1 : offset", "group"),
        ("offsets[expert] = offset", "offsets[expert] = expert == 2 ? count : offset", "group"),
    ],
)
def test_a_run_ends_before_wrong_indices_are_followed(device, old, new, role):
    """Or kernels would write over the harness's own memory."""
    checkpoint = toy.checkpoint(toy.GPT_OSS)
    report = diverge.run(checkpoint, open_device(device.name, sources=shipped().replaced("moe.cu", old, new)), IDS)
    assert (report.first.role, report.steps[-1].role) == (role, role)
    assert report.failure.startswith(f"layer 0, after {role}: the run ends here")
    assert not report.passed


def test_wrong_indices_that_lead_nowhere_else_are_followed(device):
    kernels = shipped().replaced("moe.cu", "lane] = id_of(mine);", "lane] = (id_of(mine) + 1) % E;")
    report = diverge.run(toy.checkpoint(toy.GPT_OSS), open_device(device.name, sources=kernels), IDS)
    assert report.first.role == "route"
    assert report.steps[-1].role == "head"
    assert not report.failure


@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_an_activation_within_its_product_is_judged(device, activations):
    report = diverge.run(toy.checkpoint(toy.GPT_OSS), device, MANY, activations)
    assert report.passed
    assert not any(step.outcome.refused for step in report.steps)
    gated = [step for step in report.steps if step.role.startswith("gate_up") and step.outcome.op == "gated"]
    gates = {"bound", "predicted"} if device.device_class in ("host", "sm_90") else {"bound"}
    assert {step.outcome.gate for step in gated} == gates
    assert {step.role for step in gated} == {f"gate_up, expert {e}" for e in range(4)}
    assert "swiglu" not in {step.role for step in report.steps}


def test_a_fault_of_an_activation_within_its_product_is_named(device):
    with faults.planted(faults.select(["gate-and-up-swapped-in-the-product"])[0], device.name) as broken:
        report = diverge.run(toy.checkpoint(toy.GPT_OSS), broken, MANY)
    assert (report.first.place, report.first.role) == ("layer 0", "gate_up, expert 0")
    assert report.first.outcome.op == "gated"


@pytest.mark.parametrize("what", ["output.scales", "ffn_norm", "ffn.gate.codes"])
def test_a_weight_that_changed_on_the_device_is_named(device, what):
    checkpoint = toy.checkpoint()
    model = decoder.build(checkpoint, device)
    part = model.layers[1]
    for name in what.split("."):
        part = getattr(part, name)
    part.view(torch.uint8).view(-1)[17] ^= 1
    report = diverge.of_decoder(model, checkpoint, IDS)
    role = what.replace("ffn.", "").partition(".")[0]
    assert (report.first.place, report.first.role) == ("layer 1", role)
    assert f"layers.1.{what} on the device is not the checkpoint's: 1 of " in report.first.outcome.message
    assert {(step.place, step.role) for step in report.steps if step.diverged} == {("layer 1", role)}
    assert report.growth[0].relative < 2e-3


def test_references_take_the_checkpoints_weights(device):
    """Without the bytes' own check the result would still leave its bound."""
    checkpoint = toy.checkpoint()
    model = decoder.build(checkpoint, device)
    model.layers[1].qkv.scales[5] += 1
    report = diverge.of_decoder(model, checkpoint, IDS)
    assert report.first.outcome.bad == 12  # feature 5 of every token
    assert report.first.outcome.ratio > 100
    assert "feature 5" in report.first.outcome.message


def test_large_products_are_judged_by_some_of_their_rows(device, monkeypatch):
    monkeypatch.setattr(diverge, "PRODUCTS", 1 << 16)
    monkeypatch.setattr(diverge, "PREDICTED", 1 << 14)
    report = diverge.run(toy.checkpoint(), device, IDS)
    assert report.passed
    rows = {step.outcome.gate: step.rows for step in report.steps if step.place == "head"}
    assert rows["bound"] == ((1 << 16) // (259 * 64), 12)
    assert rows.get("predicted", (2, 12)) == (2, 12)
    assert launches._some(24, 1 << 14, 1 << 16).tolist() == [0, 8, 15, 23]


def test_a_wrong_argument_shows_in_the_growth_alone(device):
    checkpoint = toy.checkpoint(toy.GPT_OSS)
    model = decoder.build(checkpoint, device)
    wrong = replace(model, layers=(model.layers[0], replace(model.layers[1], window=1)))
    report = diverge.of_decoder(wrong, checkpoint, IDS)
    assert report.passed
    first, second, _ = (each.relative for each in report.growth)
    assert first < 2e-3
    assert second > 0.1


@pytest.mark.parametrize("order", ["half", "interleaved"])
def test_a_rotation_is_judged_in_its_own_order(device, order):
    found = []
    shown = watched.Watched(device, lambda launch, _: found.extend(launches.judgeables(launch, 1 << 20)))
    x = device.upload(torch.randn(1, 5, 2, 32, generator=torch.Generator().manual_seed(0)).half())
    rope = functional.Rope(device.upload(functional.rope_table(9, 32)), order)
    functional.apply_rope(x, rope, device.upload(torch.tensor([3], dtype=torch.int32)), device=shown)
    (one,) = found
    outcome = judge(one.op, one.case, "bound", device.device_class, one.inputs, Execution(one.outputs, ()))
    assert outcome.passed, outcome.message


def test_attention_without_a_mask_is_judged_without(device):
    found = []
    shown = watched.Watched(device, lambda launch, _: found.extend(launches.judgeables(launch, 1 << 20)))
    rows = torch.randn(3, 1, 5, 2, 32, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = (device.upload(each) for each in rows)
    cache = functional.kv_cache(1, 2, 5, 32, "fp16", device=device)
    functional.kv_cache_append(cache, k, v, device.upload(torch.zeros(1, dtype=torch.int32)), device=device)
    functional.attention(q, cache, device.upload(torch.tensor([5], dtype=torch.int32)), causal=False, device=shown)
    (one,) = found
    outcome = judge(one.op, one.case, "bound", device.device_class, one.inputs, Execution(one.outputs, ()))
    assert outcome.passed, outcome.message


def test_data_that_prove_little_are_no_divergence(device):
    checkpoint = toy.checkpoint(toy.GPT_OSS)
    bias = torch.linspace(0.1, 0.9, 128)
    tensors = {**checkpoint.tensors, "layers.1.q_bias": Stored((128,), "F32", lambda: bias)}
    tensors |= {f"layers.1.{name}_bias": Stored((64,), "F32", lambda: bias[:64]) for name in "kv"}
    report = diverge.run(replace(checkpoint, tensors=tensors), device, IDS)
    refused = [step for step in report.steps if step.outcome.refused]
    assert {(step.place, step.role) for step in refused} == {("layer 1", "qkv")}
    assert "of one sign" in refused[0].outcome.message
    assert report.passed


def test_a_kernel_that_never_ends_is_named():
    """On the host device, whatever device is tested: a GPU would lose its context."""
    with faults.planted(faults.select(["return-before-a-barrier-warpgroups"])[0], "host") as broken:
        report = diverge.run(toy.checkpoint(), broken, IDS.repeat(1, 4))
    assert not report.passed
    assert report.failure.startswith("layer 0, after attention: gemm_wide_128x128_fp16: block")


def test_a_kernel_without_a_reference_is_said_to_have_none():
    with pytest.raises(UserError, match="kernel other_fp16 has no reference inside a model; there are gemm_, dense_"):
        launches.judgeables(watched.Launch("other_fp16", {}, {}), 1)
    with pytest.raises(UserError, match="gemm_small_fp16 was launched without x"):
        launches.judgeables(watched.Launch("gemm_small_fp16", {"x": None}, {}), 1)


def test_the_command_says_what_and_where(device, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load", lambda *_: (toy.checkpoint(), SAMPLE))
    options = ["diverge", "--model", "toy", "--tokens", "12", "--device", device.name]

    def ran(*more):
        with pytest.raises(SystemExit) as ended:
            cli.main([*options, *more])
        return ended.value.code, capsys.readouterr()

    code, out = ran()
    assert code == 0
    assert "every operator within its bound" in out.out
    swapped = next(fault for fault in faults.FAULTS if fault.name == "gate-and-up-swapped").change
    edit = ["--source", swapped.file, "--replace", swapped.old, swapped.new]
    code, out = ran(*edit)
    assert code == 1
    assert "FAIL: first in layer 0, swiglu (bound): gated 12x96:" in out.out
    code, out = ran(*edit, "--json")
    document = json.loads(out.out)
    assert code == 1
    assert (document["first"]["place"], document["first"]["role"]) == ("layer 0", "swiglu")
    assert document["growth"][1]["relative"] > 0.1
    for wrong, message in (
        (["--source", "gemm.cuh"], "--source FILE and --replace OLD NEW belong together"),
        (["--source", "gemm.cuh", "--replace", "no such text", "x"], "occurs 0 times"),
        (["--tokens", "4000"], "sample (not WikiText-2) has "),
    ):
        code, out = ran(*wrong)
        assert code == 2
        assert message in out.err
