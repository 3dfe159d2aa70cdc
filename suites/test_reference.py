"""The torch decoder that judges the kernels' one: against transformers, its gradients, its weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.functional.rope import Yarn
from mxharness.model import config as models
from mxharness.model import reference
from mxharness.model.checkpoint import Checkpoint, Stored
from mxharness.model.config import ModelConfig

LLAMA = ModelConfig(
    architecture="llama", layers=3, hidden=64, ffn=96, heads=4, kv_heads=2, head_size=16, vocabulary=67, context=64,
    norm_epsilon=1e-5, rope_base=1e4,
)  # fmt: skip
GPT_OSS = ModelConfig(
    architecture="gpt-oss", layers=3, hidden=64, ffn=32, heads=4, kv_heads=2, head_size=32, vocabulary=67, context=64,
    norm_epsilon=1e-5, rope_base=1e4, yarn=Yarn(factor=4.0, original_context=16, beta_fast=8.0), tied=False,
    windows=(12, None, 12), experts=5, chosen=2, swiglu_alpha=1.702, swiglu_limit=7.0,
)  # fmt: skip
CONFIGS = [LLAMA, replace(LLAMA, tied=False), GPT_OSS, replace(GPT_OSS, tied=True, yarn=None)]
NAMES = ["llama", "llama-untied", "gpt-oss", "gpt-oss-tied-plain"]


@pytest.fixture(autouse=True)
def few_queries_at_once(monkeypatch):
    """So that the short sequences here are computed in parts, as long ones are."""
    monkeypatch.setattr(reference, "QUERIES", 7)


def random_weights(config, seed=0):
    """At a scale that gives logits of a few units, sharp attention, and gates on both sides of the limit."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for weight in models.weights(config):
        noise, last = torch.randn(weight.shape, generator=generator), weight.name.rsplit(".", 1)[-1]
        wide = {"q": 0.4, "k": 0.4, "gate_up_bias": 4.0, "sinks": 2.0, "router": 0.5}.get(last, 0.2)
        found[weight.name] = 1 + 0.1 * noise if last.endswith("norm") else wide * noise
    return found


def checkpoint(config, weights, stored_in_mxfp4=()):
    def stored(name, value):
        if name in stored_in_mxfp4:
            return Stored(tuple(value.shape), "MXFP4", lambda: mxfp4.quantize(value, "even", "away"))
        return Stored(tuple(value.shape), "F32", lambda: value)

    return Checkpoint("random", "0" * 64, config, {name: stored(name, w) for name, w in weights.items()}, None)


def tokens(config, batch=2, length=48):
    return torch.randint(0, config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(config, weights, ids):
    return reference.logits(config, weights, reference.hidden_states(config, weights, ids))


# Against transformers


def peer(config, weights):
    """The same weights in transformers, attention written out, in float32."""
    transformers = pytest.importorskip("transformers", reason="not compared: the decoder with transformers' own")
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_context,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "truncate": config.yarn.truncate,
        }
    common = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attn_implementation": "eager",
    }
    if config.architecture == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    else:
        model = transformers.GptOssForCausalLM(
            transformers.GptOssConfig(
                **common,
                num_local_experts=config.experts,
                num_experts_per_tok=config.chosen,
                sliding_window=max(window or 0 for window in config.windows),
                layer_types=["sliding_attention" if window else "full_attention" for window in config.windows],
            )
        )
    model.eval().load_state_dict(transformers_names(config, weights))
    return model


def transformers_names(config, weights):
    layer = {"attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"}
    layer |= {what: f"self_attn.{what}_proj.weight" for what in "qkvo"}
    layer |= {f"{what}_bias": f"self_attn.{what}_proj.bias" for what in "qkvo"}
    layer |= {"sinks": "self_attn.sinks", "router": "mlp.router.weight", "router_bias": "mlp.router.bias"}
    if config.experts:
        layer |= {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
        layer |= {"gate_up_bias": "mlp.experts.gate_up_proj_bias", "down_bias": "mlp.experts.down_proj_bias"}
    else:
        layer |= {what: f"mlp.{what}_proj.weight" for what in ("gate", "up", "down")}
    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["final_norm"]}
    state["lm_head.weight"] = weights["embedding" if config.tied else "head"]
    for name, value in weights.items():
        if name.startswith("layers."):
            prefix, what = name.rsplit(".", 1)
            # transformers holds the experts' matrices as (experts, inputs, outputs)
            state[f"model.{prefix}.{layer[what]}"] = value.mT if value.ndim == 3 else value
    return state


def distance(got, wanted):
    """Largest error by the largest value; NaN counts as infinite."""
    worst = float((got.double() - wanted.double()).abs().max() / wanted.abs().max())
    return math.inf if math.isnan(worst) else worst


@pytest.mark.long("transformers")
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_reference_is_transformers_decoder(config):
    """Our float64 run is the yardstick: transformers' float32 run is near it, and ours as near as a few times that."""
    weights, ids = random_weights(config), tokens(config)
    double = logits(config, {name: value.double() for name, value in weights.items()}, ids)
    with torch.inference_mode():
        single, peers = logits(config, weights, ids), peer(config, weights)(ids).logits
    assert double.dtype == torch.float64
    assert double.abs().max() > 3
    # 64 products a sum, 3 layers of about 12 operations each: 36 * sqrt(64) roundings of 2^-24, none of them amplified
    assert distance(peers, double) <= 36 * 8 * 2.0**-24
    assert distance(single, double) <= 4 * max(distance(peers, double), 2.0**-22)


# Its parts


@pytest.mark.parametrize(
    "config", [replace(LLAMA, layers=1), replace(GPT_OSS, layers=1, windows=(12,))], ids=["llama", "gpt-oss"]
)
def test_gradients_are_those_of_the_loss(config):
    """The slope of the loss along a random direction, for every weight, against differences in float64."""
    weights = {name: value.double().requires_grad_() for name, value in random_weights(config).items()}
    ids = tokens(config, batch=1, length=16)

    def loss(of):
        return torch.nn.functional.cross_entropy(logits(config, of, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss(weights).backward()
    generator = torch.Generator().manual_seed(2)
    for name, value in weights.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            moved = [float(loss({**weights, name: value + sign * 1e-6 * direction})) for sign in (1, -1)]
        slope = float((value.grad * direction).sum())
        assert slope != 0, name
        assert abs((moved[0] - moved[1]) / 2e-6 - slope) <= 1e-6 * max(1, abs(slope)), name


def test_a_window_and_causality_hide_what_they_should():
    config = replace(GPT_OSS, layers=1, windows=(12,))
    weights = {name: value.double() for name, value in random_weights(config).items()}
    ids = tokens(config, batch=1)
    other = ids.clone()
    other[0, 20] = (ids[0, 20] + 1) % config.vocabulary
    moved = (logits(config, weights, ids) - logits(config, weights, other)).abs().amax(dim=-1)[0]
    changed = moved > 1e-9  # a token's last bits depend on how many others chose its expert
    assert changed.nonzero().flatten().tolist() == list(range(20, 32))


def test_an_expert_reaches_only_the_tokens_that_chose_it():
    weights, x = random_weights(GPT_OSS), torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    layer = {name.removeprefix("layers.0."): value for name, value in weights.items() if name.startswith("layers.0.")}
    _, chosen, _ = reference.route(GPT_OSS, layer, x)
    layer["down"][1] = math.nan
    broken = reference.feed_forward(GPT_OSS, layer, x).isnan().any(dim=-1)
    assert torch.equal(broken, (chosen == 1).any(dim=-1))
    assert 0 < broken.sum() < 40


# Runners


def test_runners_say_which_weights_they_have():
    weights, ids = random_weights(GPT_OSS), tokens(GPT_OSS)
    packed = {weight.name for weight in models.weights(GPT_OSS) if weight.packed}
    stored = {name for name in packed if name.endswith(("gate_up", "down"))}
    rounded = {
        name: mxfp4.dequantize(*mxfp4.quantize(value, *(("even", "away") if name in stored else ("rceil", "zero"))))
        for name, value in weights.items()
        if name in packed
    }

    def check(runner, words, expected):
        assert runner.weights == words
        states = runner.hidden_states(ids)
        assert torch.equal(states, reference.hidden_states(GPT_OSS, expected, ids))
        assert torch.equal(runner.logits(states[0]), reference.logits(GPT_OSS, expected, states[0]))

    plain, mixed = checkpoint(GPT_OSS, weights), checkpoint(GPT_OSS, weights, stored)
    whole = checkpoint(GPT_OSS, weights, packed)
    as_stored = {name: mxfp4.dequantize(*mxfp4.quantize(weights[name], "even", "away")) for name in packed}
    check(reference.float32(plain), "float32", weights)
    check(
        reference.float32(mixed), "mxfp4 (as stored), float32", {**weights, **{name: rounded[name] for name in stored}}
    )
    check(
        reference.decoded(mixed, scale_rule="rceil", tie_rule="zero"),
        "mxfp4 (as stored), mxfp4 (rceil, zero)",
        {**weights, **rounded},
    )
    check(reference.decoded(whole), "mxfp4 (as stored)", {**weights, **as_stored})
    assert reference.decoded(plain).weights == "mxfp4 (floor, even)"


def test_a_runner_refuses_what_does_not_fit():
    runner = reference.float32(checkpoint(LLAMA, random_weights(LLAMA)))
    with pytest.raises(UserError, match="a window of 65 tokens does not fit the model's context of 64"):
        runner.hidden_states(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(UserError, match="token ids from 0 to 67; the model has 0 to 66"):
        runner.hidden_states(torch.tensor([[0, 67]]))
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UserError, match="torch multiplies float32 with reduced precision"):
            reference.float32(checkpoint(LLAMA, random_weights(LLAMA)))
    finally:
        torch.set_float32_matmul_precision("highest")
