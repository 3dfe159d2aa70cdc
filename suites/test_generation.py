"""Generation: transformers' greedy tokens, draws that repeat, memory that is what it says, a sentence for misuse."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from mxharness import mxfp4
from mxharness.device import open_device
from mxharness.errors import KernelFailure, UserError
from mxharness.functional import lm_head_probabilities
from mxharness.model import toy
from mxharness.model.generation import GPTInferenceAdapter
from mxharness.model.transformers import from_transformers

from .generating import PROMPTS, generate, loaded, not_a_number

NAMES = list(toy.CONFIGS)


# Against transformers


def peer(name):
    """A model of transformers with random weights that MXFP4 holds exactly."""
    transformers = pytest.importorskip("transformers", reason="not compared: greedy tokens with transformers' own")
    config = toy.CONFIGS[name]
    common = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        "attn_implementation": "eager",
        "tie_word_embeddings": config.tied,
    }
    torch.manual_seed(0)
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    else:
        model = transformers.GptOssForCausalLM(
            transformers.GptOssConfig(
                **common, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
            )
        )  # fmt: skip
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape)
            if value.ndim == 1 or key.endswith("bias"):
                value.copy_((noise * 0.1 + key.endswith("norm.weight")).bfloat16())
            elif "router" in key:
                value.copy_((noise * 0.25).bfloat16())
            else:  # experts' matrices lie transposed
                rows = (noise * 0.25).mT.contiguous() if value.ndim == len("EKN") else noise * 0.25
                held = mxfp4.dequantize(*mxfp4.quantize(rows))
                value.copy_(held.mT if value.ndim == len("EKN") else held)
    return model.eval()


@pytest.mark.long("transformers")
@pytest.mark.parametrize("activations", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(device, name, activations):
    """But at a tie: where transformers' own two largest logits are nearer than its 16-bit run is to its float32 one."""
    model = peer(name)
    adapter = loaded(device, from_transformers(model), activations)
    narrow = copy.deepcopy(model)
    for weight in narrow.parameters():  # and not the rotary embedding's frequencies, which stay float32
        weight.data = weight.data.to({"bf16": torch.bfloat16, "fp16": torch.float16}[activations])
    permitted = total = 0
    for prompt, new in zip(PROMPTS, generate(adapter, PROMPTS, 16), strict=True):
        ids = torch.tensor([prompt + new])
        with torch.inference_mode():
            wide, rounded = (run(ids).logits[0, len(prompt) - 1 : -1].float() for run in (model, narrow))
        error = (rounded - wide).abs().amax(dim=1)
        behind = wide.amax(dim=1) - wide.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert bool((behind <= 2 * error).all()), f"a token is {float((behind / error).max()):.1f} errors behind"
        permitted += int((behind > 0).sum())
        total += len(new)
    assert permitted <= total // 10


# Same tokens


@pytest.mark.parametrize("kv", [None, "mxfp4"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_depend_on_the_batch_nor_on_cuts(device, name, kv, monkeypatch):
    """Prompts together and alone, in one piece and in several, greedy and drawn."""
    adapter = loaded(device, toy.checkpoint(toy.CONFIGS[name]))
    for settings in ({}, {"temperature": 0.9, "seed": 3, "top_k": 50, "top_p": 0.9}):
        together = generate(adapter, PROMPTS, 4, kv, settings)
        alone = [generate(adapter, [prompt], 4, kv, settings)[0] for prompt in PROMPTS]
        assert together == alone
    whole = generate(adapter, PROMPTS[:1], 4, kv)
    monkeypatch.setattr("mxharness.model.generation.PREFILL_ROWS", 2)
    assert generate(adapter, PROMPTS[:1], 4, kv) == whole


def test_a_prefill_continues_what_was_drawn(device):
    """Drawn tokens are part of the sequence: going on from them is going on from a prompt that holds them."""
    adapter = loaded(device)
    state = adapter.allocate_state(64, 2)
    adapter.prefill([[1, 2, 3], [4, 5, 6]], state)
    first = adapter.decode_next_token(state)
    second = adapter.decode_next_token(state)
    adapter.prefill([[7], [8, 9]], state)
    assert state.lengths == [6, 7]
    wholes = [[1, 2, 3, first[0], second[0], 7], [4, 5, 6, first[1], second[1], 8, 9]]
    assert [[*adapter.decode_next_token(state)] for _ in range(3)] == [
        list(row) for row in zip(*generate(adapter, wholes, 3), strict=True)
    ]


def test_draws_repeat_and_follow_the_seed(device):
    adapter = loaded(device)

    def tokens(seed, prompts=PROMPTS[:1], temperature=2.0):
        return generate(adapter, prompts, 6, None, {"temperature": temperature, "seed": seed})

    once = tokens(1)
    assert tokens(1) == once
    assert tokens(2) != once
    assert tokens(1, [PROMPTS[0] + once[0][:2]])[0][:4] == once[0][2:]  # a draw belongs to its position
    assert tokens(1, temperature=0) == generate(adapter, PROMPTS[:1], 6)
    assert tokens(1, PROMPTS[:1] * 2) == once * 2
    assert tokens([1, 2], PROMPTS[:1] * 2) == once + tokens(2)


def test_draws_follow_the_probabilities(device):
    """The first token after a prompt, by 400 seeds: how often each comes is within chance of what the softmax says."""
    adapter = loaded(device)
    state = adapter.allocate_state(8, 400)
    adapter.prefill([[72]] * 400, state)
    drawn = adapter.decode_next_token(state, temperature=1.0, seed=list(range(400)))
    p = lm_head_probabilities(state.last[:1].clone(), adapter.decoder.head, device=device)[0].double().cpu().numpy()
    counts = np.bincount(drawn, minlength=len(p))
    likely = p > 0.02
    wanted, spread = 400 * p[likely], np.sqrt(400 * p[likely] * (1 - p[likely]))
    assert likely.sum() > 3
    assert (np.abs(counts[likely] - wanted) < 4 * spread).all()


def test_graphs_and_devices_change_nothing(device):
    """On a GPU steps become graphs when settings repeat; with graphs, without, and on the host the tokens are equal."""
    settings = [{}] * 5 + [{"temperature": 0.8, "top_k": 20}] * 5 + [{}] * 4
    found = []
    for where, graphs in ((device, False), (device, True), (open_device("host"), True)):
        adapter = loaded(where, toy.checkpoint(toy.GPT_OSS), graphs=graphs)
        state = adapter.allocate_state(64, 2)
        adapter.prefill([[1, 2, 3], [4]], state)
        found.append([adapter.decode_next_token(state, **each) for each in settings])
        assert (state.captured is not None) == (graphs and where.name == "cuda")
    assert found[0] == found[1] == found[2]


# Memory


def held(device):
    """Bytes of all tensors that exist on the device, each storage once."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    tensors = [x for x in tensors if x.layout == torch.strided and x.device.type == device.torch_device.type]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("kv", ["bf16", "mxfp4"])
def test_memory_is_what_tensors_occupy(device, kv):
    checkpoint = toy.checkpoint(toy.GPT_OSS)
    gc.collect()
    before = held(device)
    adapter = loaded(device, checkpoint)
    assert adapter.get_vram_usage().total == held(device) - before
    state = adapter.allocate_state(50, 2, kv)
    adapter.prefill([[1, 2, 3], [4]], state)
    for _ in range(4):
        adapter.decode_next_token(state)
    gc.collect()
    usage = adapter.get_vram_usage()
    assert usage.total == held(device) - before
    rows = 2 * 2 * 2 * 2 * 50  # layers, keys and values, sequences, heads
    assert usage.kv_cache == rows * (64 if kv == "bf16" else 17)
    assert 0 < usage.activations < usage.peak_activations
    adapter.free_state(state)
    assert adapter.get_vram_usage()[:3] == (usage.weights, 0, 0)
    assert held(device) - before == usage.weights


# Misuse


def test_misuse_is_one_sentence(device):
    adapter = GPTInferenceAdapter(device)
    with pytest.raises(UserError, match="no model is loaded; load_weights_mxfp4 loads one"):
        adapter.allocate_state(8)
    adapter.load_weights_mxfp4(toy.checkpoint())
    for wrong in (0, 129):
        with pytest.raises(UserError, match="max_tokens must be from 1 to the model's context 128"):
            adapter.allocate_state(wrong)
    with pytest.raises(UserError, match="at least one sequence"):
        adapter.allocate_state(8, 0)
    with pytest.raises(UserError, match="no cache of dtype 'int8'"):
        adapter.allocate_state(8, 1, "int8")
    state = adapter.allocate_state(4)
    with pytest.raises(UserError, match="prefill gives a state its first tokens"):
        adapter.decode_next_token(state)
    for tokens, message in (
        ([], "at least one token"),
        ([1, 2, 3, 4, 5], "would have 5 tokens, the state has room for 4"),
        ([[1], [2]], "2 lists of tokens for 1 sequences"),
        ([[1], 2], "not both"),
        ([1.5], "must be an integer"),
        ([259], "0 to 258"),
        ([-1], "0 to 258"),
    ):
        with pytest.raises(UserError, match=message):
            adapter.prefill(tokens, state)
    adapter.prefill([1, 2, 3], state)
    for seed, message in (([1, 2], "2 seeds for 1 sequences"), (-1, "from 0 to 2"), (0.5, "a seed must be an integer")):
        with pytest.raises(UserError, match=message):
            adapter.decode_next_token(state, 1.0, seed)
    for settings, message in (
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 1.0, "top_k": 260}, "top-k keeps 1 to 259"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p"),
    ):
        with pytest.raises(UserError, match=message):
            adapter.decode_next_token(state, **settings)
    tokens = [adapter.decode_next_token(state) for _ in range(2)]
    with pytest.raises(UserError, match="room for 4 tokens and is full"):
        adapter.decode_next_token(state)
    assert tokens == [[row] for row in generate(adapter, [[1, 2, 3]], 2)[0]]
    adapter.free_state(state)
    adapter.free_state(state)
    with pytest.raises(UserError, match="was freed"):
        adapter.decode_next_token(state)
    with pytest.raises(UserError, match="belongs to another model"):
        adapter.prefill([1], loaded(device).allocate_state(4))


def test_another_model_frees_the_states_of_the_one_before(device):
    adapter = loaded(device)
    state = adapter.allocate_state(8)
    adapter.load_weights_mxfp4(toy.checkpoint(toy.GPT_OSS))
    assert adapter.get_vram_usage()[1:] == (0, 0, 0)
    with pytest.raises(UserError, match="was freed"):
        adapter.prefill([1], state)


def test_nan_is_a_failure_and_no_token(device):
    with pytest.raises(KernelFailure, match="logits of sequence 0 hold NaN"):
        generate(loaded(device, not_a_number()), [[1]], 1)
