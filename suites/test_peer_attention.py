"""Attention against torch and transformers: the core, whole blocks of Llama and gpt-oss, and rotation.

In float64, with our decoded weights, they compute what our references do; and the kernels stay within the references'
bounds of their numbers.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from mxharness import functional, golden, mxfp4
from mxharness.bounds import exact
from mxharness.execution import execute
from mxharness.judge import judge
from mxharness.op import Case
from mxharness.ops import attention as attention_ops
from mxharness.ops import attention_reference, find
from mxharness.ops.attention_reference import core
from mxharness.ops.kv_cache import HEAD_DIMS
from mxharness.ops.kv_cache_reference import rotate

EXACT = 1e-10
"""Of the largest element: what float64 may lose in another order of sums."""
CORE = [case for case in find("attention").cases if case.regime in ("normal", "large", "equal") and case.shape[0] < 99]
BLOCKS = [
    case
    for name in ("multi_head_attention", "grouped_query_attention")
    for case in find(name).cases
    if case.option("cache") != "mxfp4" and case.option("rope") != "interleaved" and case.shape[0] < 99
]


def peer(module):
    """`transformers`' module; without the package the test is skipped, saying what was not compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages that transformers finds installed
        return pytest.importorskip(module, reason=f"transformers is not installed; not compared: {module}")


def near(ours, theirs):
    return bool((ours - theirs).abs().max() <= EXACT * theirs.abs().max())


def within_bounds(op, case, gate, device, values):
    """The judge's verdict with a peer's values in the place of our reference's."""
    inputs = op.make_inputs(case)
    execution = execute(op, case, device, inputs)

    def theirs(case, tensors):
        ours = (op.composed if gate == "composed" else op.golden)(case, tensors)
        return {**ours, **{name: replace(ours[name], value=value) for name, value in values.items()}}

    outcome = judge(replace(op, golden=theirs, composed=theirs), case, gate, device.device_class, inputs, execution)
    assert outcome.passed, outcome.message


def torchs(case, inputs):
    """scaled_dot_product_attention in float64; a sink is one more key of score `sink` and value zero."""
    q = inputs["q"].double().transpose(1, 2)
    k, v = (x.nan_to_num() for x in attention_reference.decoded_cache(case, inputs))
    rule = attention_reference.rule(case, inputs, inputs["lengths"])
    seen = rule.visible(q.shape[2], k.shape[2]).expand(-1, q.shape[1], -1, -1)
    mask = torch.where(seen, 0.0, -torch.inf).double()
    if rule.sinks is not None:
        sink = rule.sinks.double()[None, :, None, None].expand(*mask.shape[:3], 1)
        mask = torch.cat((mask, sink), -1)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=rule.scale, enable_gqa=q.shape[1] > k.shape[1]
    )
    return torch.where(seen.any(-1, keepdim=True), y, 0.0).transpose(1, 2)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_torch_computes_what_our_core_does(case, device):
    op = find("attention")
    inputs = op.make_inputs(case)
    theirs = torchs(case, inputs)
    assert near(op.golden(case, inputs)["y"].value, theirs)
    within_bounds(op, case, "bound", device, {"y": theirs})


def test_torchs_own_causal_mask_is_ours():
    case = Case("attention", (2, 65, 4, 2, 32, 65))
    op = find("attention")
    inputs = {**op.make_inputs(case), "lengths": torch.tensor([65, 65], dtype=torch.int32)}
    q, k, v = (inputs[name].double().nan_to_num() for name in "qkv")
    y = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
    rule = attention_reference.rule(case, inputs, inputs["lengths"])
    ours = core(exact(q), exact(k), exact(v), replace(rule, scale=32**-0.5), torch.bfloat16)
    assert near(ours.value, y.transpose(1, 2))


def module_of(case, inputs):
    """LlamaAttention, or GptOssAttention where there are sinks, in float64 with our decoded weights."""
    _, _, K, Hkv, G, D, _ = case.shape
    sizes = {
        "hidden_size": K,
        "num_attention_heads": Hkv * G,
        "num_key_value_heads": Hkv,
        "head_dim": D,
        "attention_bias": "bias" in case.options,
    }
    if "sinks" in inputs:
        modeling = peer("transformers.models.gpt_oss.modeling_gpt_oss")
        config = modeling.GptOssConfig(**sizes, num_hidden_layers=1)
        config._attn_implementation = "eager"
        module = modeling.GptOssAttention(config, 0)
    else:
        modeling = peer("transformers.models.llama.modeling_llama")
        config = modeling.LlamaConfig(**sizes, num_hidden_layers=1)
        config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
        module = modeling.LlamaAttention(config, 0)
    out = golden.decode(mxfp4.unpack(inputs["codes"]), inputs["scales"])
    module.o_proj = torch.nn.Linear(out.shape[1], out.shape[0], bias="bias" in inputs)
    values = {"o_proj.weight": out}
    for name, (codes, scales, bias) in attention_ops.projections(case, inputs).items():
        values[f"{name}_proj.weight"] = golden.decode(mxfp4.unpack(codes), scales)
        values |= {} if bias is None else {f"{name}_proj.bias": bias}
    values |= {"o_proj.bias": inputs["bias"]} if "bias" in inputs else {}
    values |= {"sinks": inputs["sinks"]} if "sinks" in inputs else {}
    module.double().load_state_dict({name: value.double() for name, value in values.items()})
    return module.requires_grad_(requires_grad=False).eval()


def transformerss(case, inputs):
    """Y (B, T, N), sequence by sequence, each with its own past in a DynamicCache."""
    module, T, D = module_of(case, inputs), case.shape[1], case.shape[5]
    cache_utils = peer("transformers.cache_utils")
    found = []
    for b, start in enumerate(inputs["positions"].tolist()):
        past = cache_utils.DynamicCache()
        if start:
            past.update(*(inputs[f"past_{n}"][b : b + 1, :start].double().transpose(1, 2) for n in "kv"), 0)
        turn = torch.tensor([[1.0, 0.0]]).double().expand(T, D // 2, 2)
        if "angles" in inputs:
            turn = inputs["angles"][start : start + T].double()
        turn = turn.unsqueeze(0)
        if "sinks" not in inputs:  # Llama's has every angle twice
            turn = torch.cat((turn, turn), 2)
        rule = attention_reference.rule(case, inputs, torch.tensor([start + T]))
        mask = torch.where(rule.visible(T, start + T), 0.0, -torch.inf).double()
        y, _ = module(inputs["x"][b : b + 1].double(), (turn[..., 0], turn[..., 1]), mask, past_key_values=past)
        found.append(y)
    return torch.cat(found)


@pytest.mark.long("transformers")
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_transformers_computes_what_our_block_does(case, device):
    """To float64's precision but for the scale, which a kernel takes as float32."""
    op = find(case.op)
    inputs = op.make_inputs(case)
    theirs = transformerss(case, inputs)
    ours = op.composed(case, inputs)["y"].value
    assert bool((ours - theirs).abs().max() <= 2.0**-24 * theirs.abs().max())
    within_bounds(op, case, "composed", device, {"y": theirs})


@pytest.mark.long("transformers")
def test_a_block_with_window_and_sinks_is_gpt_osss(device):
    """All that gpt-oss has at once: bias, YaRN, sinks and a sliding window, over a past."""
    op = find("grouped_query_attention")
    options = ("bias", "fused", "rope=yarn", "sinks", "window=6")
    case = Case("grouped_query_attention", (2, 3, 64, 2, 2, 64, 66), dtype="fp16", options=options)
    theirs = transformerss(case, op.make_inputs(case))
    ours = op.composed(case, op.make_inputs(case))["y"].value
    assert bool((ours - theirs).abs().max() <= 2.0**-24 * theirs.abs().max())
    within_bounds(op, case, "composed", device, {"y": theirs})


# rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.long("transformers")
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_pair_orders_are_transformers_llamas_and_gptjs(D):
    """Llama and gpt-oss pair i with i + D/2, GPT-J 2i with 2i + 1."""
    llama = peer("transformers.models.llama.modeling_llama")
    gptj = peer("transformers.models.gptj.modeling_gptj")
    x = torch.randn(1, 9, 2, D, generator=torch.Generator().manual_seed(D), dtype=torch.float64)
    table, start = functional.rope_table(40, D).double(), torch.tensor([20])
    cos, sin = (table[None, 20:29, :, i] for i in range(2))
    half, _ = llama.apply_rotary_pos_emb(x, x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), unsqueeze_dim=2)
    assert near(rotate(x, table, start, "half").value, half)
    assert near(rotate(x, table, start, "interleaved").value, gptj.apply_rotary_pos_emb(x, sin, cos))


@pytest.mark.long("transformers")
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_the_table_is_llamas(base):
    """Transformers computes angles in float32: position times a frequency that is off by an ulp or two."""
    llama = peer("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": base})
    assert_near_angles(llama.LlamaRotaryEmbedding(config), functional.rope_table(500, 64, base), repeated=True)


@pytest.mark.long("transformers")
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("factor", "context", "D"), [(32.0, 4096, 64), (4.0, 128, 96), (2.0, 30, 32)])
def test_the_table_of_yarn_is_gpt_osss(factor, context, D, truncate):
    gpt_oss = peer("transformers.models.gpt_oss.modeling_gpt_oss")
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": truncate,
        "original_max_position_embeddings": context,
    }
    config = gpt_oss.GptOssConfig(head_dim=D, rope_parameters=parameters, max_position_embeddings=int(factor * context))
    scaling = functional.Yarn(factor=factor, original_context=context, truncate=truncate)
    table = functional.rope_table(500, D, 150_000.0, scaling=scaling)
    assert_near_angles(gpt_oss.GptOssRotaryEmbedding(config), table, repeated=False)


def assert_near_angles(module, table, *, repeated):
    positions = torch.arange(table.shape[0])
    cos, sin = (x[0].double() for x in module(torch.zeros(1), positions[None]))
    if repeated:
        assert torch.equal(cos[:, : cos.shape[1] // 2], cos[:, cos.shape[1] // 2 :])
    allowed = (positions[:, None] * 4 + 4) * 2.0**-24 * 1.5  # 4 ulps of the angle; 1.5: more than any attention factor
    for i, theirs in enumerate((cos, sin)):
        assert bool(((table[..., i].double() - theirs[:, : table.shape[1]]).abs() <= allowed).all())
