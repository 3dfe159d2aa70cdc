"""Drop-in modules: the bits of the functions beneath, torch's habits (casts, copies, checkpoints), whole models."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.errors import UserError
from mxharness.mxfp4 import Quantized
from mxharness.nn import MXFP4Embedding, MXFP4Linear, quantize_model

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def where(device):
    """The torch device on which modules and inputs lie."""
    return device.torch_device


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same_bits(a, b):
    """Equal in shape, dtype and every byte: a NaN equals itself, zeros of two signs differ."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def decoded(module):
    """A float32 copy of a model with torch layers on the decoded weights."""
    module = copy.deepcopy(module)
    for name, old in list(module.named_modules(remove_duplicate=False)):
        if isinstance(old, MXFP4Linear):
            new = torch.nn.Linear(old.in_features, old.out_features, old.bias is not None, device=old.codes.device)
            if old.bias is not None:
                new.bias.data = old.bias
        elif isinstance(old, MXFP4Embedding):
            new = torch.nn.Embedding(old.num_embeddings, old.embedding_dim, device=old.codes.device)
        else:
            continue
        new.weight.data = mxfp4.dequantize(*old.packed)[:, : old.columns].contiguous()
        module.set_submodule(name, new)
    return module


# A linear layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("K", [64, 45])
def test_a_linear_layer_has_the_bits_of_gemm(where, K, dtype, bias):
    layer = MXFP4Linear(K, 21, bias, device=where)
    x = torch.randn(2, 5, K, device=where).to(dtype)
    padded = torch.zeros(10, 64, dtype=dtype, device=where)
    padded[:, :K] = x.view(10, K)
    weight = Quantized(layer.codes, layer.scales)
    wanted = functional.gemm_bias(padded, weight, layer.bias) if bias else functional.gemm(padded, weight)
    assert same_bits(layer(x), wanted.view(2, 5, 21))


@pytest.mark.parametrize("K", [64, 45, 1])
def test_a_linear_layer_is_a_product_with_its_decoded_weight(where, K):
    linear = torch.nn.Linear(K, 21, device=where)
    layer = MXFP4Linear.from_linear(linear)
    x = torch.randn(7, K, device=where).bfloat16()
    w = mxfp4.dequantize(*mxfp4.quantize(linear.weight))[:, :K].double()
    wanted = x.double() @ w.T + linear.bias.double()
    bound = (K + 2) * 2**-23 * (x.double().abs() @ w.abs().T + linear.bias.abs()) + 2**-8 * wanted.abs()
    assert bool(((layer(x).double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_float32_input_is_rounded_and_its_sums_are_not(where, dtype):
    layer = MXFP4Linear(64, 21, device=where, compute_dtype=dtype)
    x = torch.randn(4, 64, device=where)
    wanted = functional.gemm_bias(x.to(dtype), layer.packed, layer.bias, out_dtype=torch.float32)
    assert same_bits(layer(x), wanted)
    assert not torch.equal(wanted, wanted.to(dtype).float())


def test_any_view_of_an_input_works(where):
    layer = MXFP4Linear(32, 8, device=where)
    data = torch.randn(6, 65, device=where).bfloat16()
    for view in (data[:, 1:33], data[::2, :32], data.view(-1)[3:35], data[:, :32].T.contiguous().T, data[0, 1:33]):
        assert same_bits(layer(view), layer(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(0, 45), (3, 0, 45)])
def test_no_rows_give_no_rows(where, shape, dtype):
    y = MXFP4Linear(45, 8, device=where)(torch.empty(shape, dtype=dtype, device=where))
    assert (y.shape, y.dtype) == ((*shape[:-1], 8), dtype)


def test_a_new_layer_has_torch_s_random_weights_rounded(where):
    torch.manual_seed(3)
    linear = torch.nn.Linear(45, 9, device=where)
    torch.manual_seed(3)
    layer = MXFP4Linear(45, 9, device=where, scale_rule="ceil", tie_rule="zero")
    codes, scales = mxfp4.quantize(linear.weight, "ceil", "zero")
    assert same_bits(layer.codes, codes)
    assert same_bits(layer.scales, scales)
    assert same_bits(layer.bias, linear.bias.detach())
    assert not torch.equal(scales, mxfp4.quantize(linear.weight)[1])


def test_from_linear_leaves_its_argument_alone(where):
    linear = torch.nn.Linear(64, 9, device=where, dtype=torch.bfloat16)
    before = copy.deepcopy(linear)
    layer = MXFP4Linear.from_linear(linear, scale_rule="rceil")
    layer.bias.zero_()
    assert same_state(linear, before)
    assert same_bits(layer.scales, mxfp4.quantize(linear.weight, "rceil")[1])


def test_its_weight_can_be_looked_at(where):
    linear = torch.nn.Linear(45, 9, device=where, dtype=torch.float16)
    layer = MXFP4Linear.from_linear(linear)
    assert same_bits(layer.weight, mxfp4.dequantize(*mxfp4.quantize(linear.weight), torch.float16)[:, :45])
    assert "in_features=45, out_features=9, bias=True, dtype=torch.float16" in repr(layer)


def wanting_gradient():
    return MXFP4Linear(32, 4)(torch.ones(1, 32, requires_grad=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wanting_gradient, "x requires a gradient; call them under torch.no_grad"),
        (lambda: MXFP4Linear(32, 4)(torch.ones(1, 31)), r"x must be \(.., 32\), not \(1, 31\)"),
        (lambda: MXFP4Linear(32, 4)(torch.tensor(1.0)), r"x must be \(.., 32\), not \(\)"),
        (lambda: MXFP4Linear(32, 4)(torch.ones(1, 32).double()), "not torch.float64"),
        (lambda: MXFP4Linear(0, 4), "must be positive, not 0 and 4"),
        (lambda: MXFP4Linear(32, 4, dtype=torch.float64), "not torch.float64"),
        (lambda: MXFP4Linear(32, 4, compute_dtype=torch.float32), "compute_dtype must be"),
        (lambda: MXFP4Linear(32, 4, scale_rule="round"), "no scale rule 'round'"),
        (lambda: MXFP4Linear.from_linear(torch.nn.Embedding(4, 32)), "takes a torch.nn.Linear, not Embedding"),
        (lambda: MXFP4Linear.from_quantized(mxfp4.quantize(torch.ones(4, 64)), in_features=32), "give 33 to 64"),
        (lambda: MXFP4Linear.from_quantized(mxfp4.quantize(torch.ones(4, 64)), torch.ones(5)), r"bias must be \(4,\)"),
        (lambda: MXFP4Linear.from_quantized(mxfp4.quantize(torch.ones(2, 4, 64))), r"codes are \(N, K/2\)"),
        (lambda: MXFP4Linear.from_quantized(Quantized(torch.ones(4, 16), torch.ones(4, 1))), "must be uint8"),
    ],
)
def test_what_a_linear_layer_refuses(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_an_input_that_wants_a_gradient_works_without_gradients(where):
    layer, x = MXFP4Linear(32, 4, device=where), torch.ones(1, 32, device=where, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).shape == (1, 4)


# An embedding


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("K", [64, 45])
def test_an_embedding_gives_rows_of_its_decoded_table(where, K, dtype):
    source = torch.nn.Embedding(19, K, device=where, dtype=dtype)
    layer = MXFP4Embedding.from_embedding(source)
    table = mxfp4.dequantize(*mxfp4.quantize(source.weight), dtype)[:, :K]
    for ids in (torch.tensor([[0, 18, 3], [3, 3, 1]]), torch.tensor(7, dtype=torch.int32), torch.arange(8)[::2]):
        assert same_bits(layer(ids.to(where)), table[ids.long().to(where)])
    assert same_bits(layer.weight, table)
    assert layer(torch.empty(2, 0, dtype=torch.int64, device=where)).shape == (2, 0, K)


def test_a_padding_row_is_what_it_is_in_torch(where):
    fresh = MXFP4Embedding(6, 32, padding_idx=-2, device=where)
    assert fresh.padding_idx == 4
    assert not fresh(torch.tensor([4], device=where)).any()
    trained = torch.nn.Embedding.from_pretrained(torch.ones(6, 32, device=where), padding_idx=4)
    ids = torch.tensor([4], device=where)
    assert same_bits(MXFP4Embedding.from_embedding(trained)(ids), trained(ids))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MXFP4Embedding(4, 32)(torch.tensor([4])), r"ids\[0\] is 4, the vocabulary has 4 ids"),
        (lambda: MXFP4Embedding(4, 32)(torch.tensor([-1])), r"ids\[0\] is -1"),
        (lambda: MXFP4Embedding(4, 32)(torch.tensor([1.0])), "must be int32 or int64"),
        (lambda: MXFP4Embedding(4, 0), "must be positive"),
        (lambda: MXFP4Embedding(4, 32, 4), "padding_idx is 4, the table has 4 rows"),
        (lambda: MXFP4Embedding.from_embedding(torch.nn.Linear(2, 2)), "takes a torch.nn.Embedding, not Linear"),
        (lambda: MXFP4Embedding.from_embedding(torch.nn.Embedding(2, 2, max_norm=1.0)), "max_norm"),
    ],
)
def test_what_an_embedding_refuses(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Casts, copies, checkpoints

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


def through_torch(state, folder):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


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


# Whole models


class Tied(torch.nn.Module):
    """Token table and head with one weight, a layer in two places, and what must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, 45)
        self.layers = torch.nn.Sequential(torch.nn.Linear(45, 64), torch.nn.SiLU(), torch.nn.Linear(64, 45))
        self.norm = torch.nn.LayerNorm(45)
        self.again = self.layers[0]
        self.head = torch.nn.Linear(45, 23, bias=False)
        self.head.weight = self.embed.weight
        self.router = torch.nn.Parameter(torch.randn(4, 45).half().float())  # survives half()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, ids):
        """Logits (.., 23) of ids (..)."""
        h = self.embed(ids)
        h = self.norm(h + self.layers(h) + self.layers[2](self.again(h)))
        return self.head(self.dropout(h))


def test_a_model_is_replaced_in_place_and_computes_with_its_decoded_weights(where):
    model = Tied().to(where)
    ids = torch.arange(23, device=where).view(1, 23)
    report = quantize_model(model, compute_dtype=torch.float16)
    assert [one.name for one in report.replaced] == ["embed", "head", "layers.0", "again", "layers.2"]
    assert isinstance(model.layers[0], MXFP4Linear)
    assert model.again is model.layers[0]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        found, wanted = model(ids), decoded(model)(ids)
    # float16 activations: 2^-11 each, through three layers
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 4 * 2**-11


def test_tied_weights_stay_one_through_moves_copies_and_checkpoints(where):
    model = Tied()
    quantize_model(model)
    ids = torch.arange(23)
    wanted = model(ids)

    def tied(other):
        return other.embed.codes is other.head.codes and other.embed.scales is other.head.scales

    for other in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301  our own bytes
        copy.deepcopy(model).to(where).half().to("cpu").float(),
    ):
        assert tied(other)
        assert other.embed.codes.data_ptr() == other.head.codes.data_ptr()
        assert same_state(other, model)
        assert same_bits(other(ids), wanted)
    loaded = Tied()
    quantize_model(loaded)
    loaded.load_state_dict(through_torch(model.state_dict(), None), strict=True)
    assert tied(loaded)
    assert same_bits(loaded(ids), wanted)
    loaded.embed.codes.zero_()
    assert not loaded.head.codes.any()


def test_a_tied_model_goes_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="not tried: a tied model through safetensors")
    model, loaded = Tied(), Tied()
    quantize_model(model)
    quantize_model(loaded)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(loaded, tmp_path / "model.safetensors")
    assert same_state(model, loaded)


def test_a_report_counts_bytes_and_errors_and_names_what_is_left():
    model = Tied()
    before = sum(parameter.nbytes for parameter in model.parameters())
    weights = {name: model.get_submodule(name).weight.detach().double() for name in ("embed", "layers.0")}
    report = quantize_model(model)
    assert report.before == before
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert report.after == sum(held.values())
    by_name = {one.name: one for one in report.replaced}
    assert (by_name["head"].tied_to, by_name["again"].tied_to, by_name["embed"].tied_to) == ("embed", "layers.0", None)
    assert by_name["layers.0"].before == 4 * 45 * 64
    assert by_name["layers.0"].after == mxfp4.nbytes((64, 45))
    for name, weight in weights.items():
        noise = (model.get_submodule(name).weight.double() - weight).square().sum()
        assert by_name[name].sqnr == pytest.approx(float(10 * torch.log10(weight.square().sum() / noise)), abs=1e-6)
        assert 17 < by_name[name].sqnr < 21
    (left,) = report.left
    assert (left.name, left.shape, left.why) == ("router", (4, 45), "Tied is no nn.Linear, nn.Embedding or Conv1D")
    assert "router (4, 45), 720 bytes" in str(report)
    assert str(report).startswith(f"5 modules hold MXFP4: {before:,} bytes became {report.after:,}")


def test_sqnr_of_exact_and_of_zero_weights():
    model = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.Linear(32, 2))
    model[0].weight.data.fill_(1.5)
    model[1].weight.data.zero_()
    exact, zero = quantize_model(model).replaced
    assert exact.sqnr == math.inf
    assert math.isnan(zero.sqnr)


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("layers.2", {"layers.2"}),
        (["layers"], {"layers.0", "layers.2", "again"}),
        ("layers.?", {"layers.0", "layers.2", "again"}),
        ("head", {"head", "embed"}),
        (("*bed",), {"head", "embed"}),
    ],
)
def test_what_is_skipped_stays_and_takes_what_is_tied_to_it_along(skip, kept):
    model = Tied()
    report = quantize_model(model, skip=skip)
    assert {one.name for one in report.replaced} == {"embed", "head", "layers.0", "again", "layers.2"} - kept
    reasons = {one.name.removesuffix(".weight"): one.why for one in report.left}
    assert reasons.keys() == kept | {"router"}
    assert all("skipped by" in reasons[name] or "which is left" in reasons[name] for name in kept)
    assert model.head.weight.dtype == torch.float32
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr() or "head" not in kept


class Scaled(torch.nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        """Twice the product."""
        return 2 * super().forward(x)


def test_layers_that_compute_something_else_are_left():
    hooked = torch.nn.Linear(32, 32)
    hooked.register_forward_hook(lambda module, args, output: -output)
    model = torch.nn.Sequential(
        Scaled(32, 32), hooked, torch.nn.Linear(32, 32).double(), torch.nn.Linear(32, 32), torch.nn.Conv1d(32, 32, 3)
    )
    report = quantize_model(model)
    assert [one.name for one in report.replaced] == ["3"]
    assert [one.name for one in report.left] == ["0.weight", "1.weight", "2.weight", "4.weight"]
    assert "hooks" in report.left[1].why


def broken():
    model = Tied()
    model.layers[2].weight.data[0, 0] = math.nan
    return model


def twice():
    model = Tied()
    quantize_model(model)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (twice, {}, "holds MXFP4 modules already"),
        (broken, {}, r"layers\.2\.weight holds NaN or Inf"),
        (Tied, {"skip": "lm_head"}, "no module fits the skip pattern 'lm_head'; some are embed, layers.0"),
        (Tied, {"skip": "*"}, "no nn.Linear, nn.Embedding or Conv1D to replace"),
        (Tied, {"scale_rule": "nearest"}, "no scale rule 'nearest'"),
        (Tied, {"compute_dtype": torch.float32}, "compute_dtype must be"),
        (lambda: torch.nn.Linear(32, 32), {}, "itself one layer; use MXFP4Linear.from_linear"),
        (lambda: torch.nn.LayerNorm(32), {}, "no nn.Linear, nn.Embedding or Conv1D to replace"),
    ],
)
def test_a_model_that_cannot_be_quantised_stays_as_it_was(model, options, message):
    model = model()
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match=message):
        quantize_model(model, **options)
    assert same_state(model, before)
    assert model.training == before.training


def test_a_model_without_memory_can_be_filled_from_a_checkpoint():
    model = Tied()
    quantize_model(model)
    with torch.device("meta"):
        empty = Tied()
    report = quantize_model(empty)
    assert math.isnan(report.replaced[0].sqnr)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert same_state(empty, model)


# transformers' models


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
