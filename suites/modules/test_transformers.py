"""transformers' own models with their layers replaced: tokens, checkpoints, what is left."""

from __future__ import annotations

import pytest
import torch
from mxharness.nn import quantize_model

from .layers import decoded, same_bits, same_state

pytestmark = pytest.mark.long("transformers")
"""Which takes long to import."""


def rounded(model, dtype):
    """The same model, every linear layer's input rounded to dtype: what the kernels multiply."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype).float(),))
    return model


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="not measured: quantize_model on transformers' models")


def llama(transformers, tied):
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_generates_the_tokens_of_its_decoded_weights(transformers, where, tied):
    """Tokens differ from those of the decoded weights only where two logits are closer than both models' logits."""
    model = llama(transformers, tied).to(where)
    report = quantize_model(model, compute_dtype=torch.bfloat16)
    assert len(report.replaced) == 2 * 7 + 2
    assert not report.left
    assert (model.lm_head.codes is model.model.embed_tokens.codes) == tied
    prompt = torch.tensor([[5, 17, 101, 2], [99, 3, 3, 70]], device=where)
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert tokens.shape == (2, 16)
    assert len(tokens[:, 4:].unique()) > 4
    with torch.no_grad():
        found = model(tokens).logits
        wanted = rounded(decoded(model), torch.bfloat16)(tokens).logits
    error = float((found - wanted).abs().max())
    assert error < 2**-8 * float(wanted.abs().max())  # a sum that rounds the other way moves an activation by one ulp
    chosen = wanted[:, 3:-1].gather(-1, tokens[:, 4:, None])[..., 0]
    assert bool((chosen >= wanted[:, 3:-1].amax(-1) - 2 * error).all())
    agree = (wanted[:, 3:-1].argmax(-1) == tokens[:, 4:]).float().mean()
    assert agree > 0.9


def test_a_llama_is_saved_and_loaded_by_transformers_own_means(transformers, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="not tried: save_pretrained")
    model, loaded = llama(transformers, tied=True), llama(transformers, tied=True)
    quantize_model(model)
    quantize_model(loaded)
    model.save_pretrained(tmp_path)
    safetensors.load_model(loaded, tmp_path / "model.safetensors")
    assert same_state(model, loaded)
    loaded.tie_weights()
    assert loaded.lm_head.codes.data_ptr() == loaded.model.embed_tokens.codes.data_ptr()
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert same_bits(model(ids).logits, loaded(ids).logits)


def test_gpt2_s_transposed_layers_are_replaced(transformers, where):
    config = transformers.GPT2Config(vocab_size=67, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).to(where).eval()
    report = quantize_model(model, compute_dtype=torch.float16)
    assert {one.kind for one in report.replaced} == {"Conv1D", "Embedding", "Linear"}
    assert not report.left
    assert model.transformer.h[0].mlp.c_fc.out_features == 128
    ids = torch.arange(16, device=where)[None]
    with torch.no_grad():
        found, wanted = model(ids).logits, rounded(decoded(model), torch.float16)(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2**-11


def test_gpt_oss_experts_are_left_and_reported(transformers):
    config = transformers.GptOssConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    model = transformers.GptOssForCausalLM(config).eval()
    report = quantize_model(model)
    left = {one.name.rsplit("mlp.")[-1]: one for one in report.left}
    assert {"experts.gate_up_proj", "experts.down_proj", "router.weight"} <= left.keys()
    assert left["experts.gate_up_proj"].why == "GptOssExperts is no nn.Linear, nn.Embedding or Conv1D"
    assert {"model.embed_tokens", "lm_head"} <= {one.name for one in report.replaced}
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()
