"""Drop-in modules: the bits of the functions beneath, torch's habits (casts, copies, checkpoints), whole models."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from mxharness import compat, functional, mxfp4
from mxharness.errors import UserError
from mxharness.mxfp4 import Quantized
from mxharness.nn import (
    MXFP4Embedding,
    MXFP4Experts,
    MXFP4Linear,
    MXFP4LinearWithActivation,
    MXFP4MoE,
    create_quantized_mlp_block,
    quantize_model,
)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear_leaves_its_argument_alone(where, dtype):
    linear = torch.nn.Linear(64, 9, device=where, dtype=dtype)
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
    biases = [model.layers[i].bias.detach().clone() for i in (0, 2)]
    report = quantize_model(model, compute_dtype=torch.float16)
    assert all(same_bits(model.layers[i].bias, bias) for i, bias in zip((0, 2), biases, strict=True))
    assert [one.name for one in report.replaced] == ["embed", "head", "layers.0", "again", "layers.2"]
    assert isinstance(model.layers[0], MXFP4Linear)
    assert model.again is model.layers[0]
    assert repr(model.head) == "MXFP4Linear(in_features=45, out_features=23, bias=False, dtype=torch.float32, " + (
        "compute_dtype=torch.float16)"
    )
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        found, wanted = model(ids), decoded(model)(ids)
    # float16 activations: 2^-11 each, through three layers
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 4 * 2**-11


def test_rules_and_compute_dtype_reach_every_module():
    weights = {name: Tied().get_submodule(name).weight for name in ("embed", "layers.2")}
    model = Tied()
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.data
    quantize_model(model, scale_rule="rceil", tie_rule="away", compute_dtype=torch.float16)
    for name, weight in weights.items():
        codes, scales = mxfp4.quantize(weight, "rceil", "away")
        assert same_bits(model.get_submodule(name).codes, codes)
        assert same_bits(model.get_submodule(name).scales, scales)
    assert {layer.compute_dtype for layer in model.modules() if isinstance(layer, MXFP4Linear)} == {torch.float16}


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
        copy.deepcopy(model)._apply(torch.clone),  # what a move does, also where all tensors are on the CPU
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


def test_weights_that_share_memory_alone_are_tied_too():
    model = Tied()
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach())
    before = quantize_model(Tied()).before
    report = quantize_model(model)
    assert report.before == before
    assert model.head.codes is model.embed.codes


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


# An activation behind a layer, and experts


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_layer_with_swiglu_is_gpt_oss_formula(where, dtype):
    layer = MXFP4LinearWithActivation(45, 12, activation="swiglu", swiglu_limit=1.5, device=where)
    x = 2 * torch.randn(3, 5, 45, device=where).to(dtype)
    product = layer.linear(x).double()
    gate, up = product[..., ::2].clamp(max=1.5), product[..., 1::2].clamp(-1.5, 1.5)
    wanted = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    assert float(product.max()) > 1.5
    assert float(product[..., 1::2].min()) < -1.5
    y = layer(x)
    assert (y.shape, y.dtype) == ((3, 5, 6), dtype)
    roundoff = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert bool(((y.double() - wanted).abs() <= roundoff * wanted.abs() + 2**-20).all())
    assert layer(x[:0]).shape == (0, 5, 6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_layer_with_gelu_is_torch_s_gelu(where, activation, dtype):
    layer = MXFP4LinearWithActivation.around(MXFP4Linear(45, 12, device=where), activation=activation)
    x = 2 * torch.randn(3, 5, 45, device=where).to(dtype)
    product = layer.linear(x.bfloat16() if dtype == torch.float32 else x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    wanted = torch.nn.functional.gelu(product.double(), approximate=approximate)
    y = layer(x)
    assert (y.shape, y.dtype) == ((3, 5, 12), dtype)
    assert bool(((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 2**-20).all())
    assert layer(x[:, :0]).shape == (3, 0, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MXFP4LinearWithActivation(32, 4, activation="relu"), "no activation 'relu'; there are swiglu, gelu"),
        (lambda: MXFP4LinearWithActivation(32, 5), "5 out_features are no pairs"),
        (lambda: MXFP4LinearWithActivation(32, 4, swiglu_limit=0.0), "swiglu_limit must be positive"),
        (lambda: MXFP4LinearWithActivation(32, 4)(torch.ones(1, 31)), r"x must be \(.., 32\)"),
        (lambda: MXFP4LinearWithActivation(32, 4, activation="gelu")(torch.ones(1, 31)), r"x must be \(.., 32\)"),
        (lambda: MXFP4Experts(2, 45, 4), "multiple of 32, not 45"),
        (lambda: MXFP4Experts(2, 32, 4, activation="gelu"), "no activation 'gelu'; there are swiglu"),
        (lambda: create_quantized_mlp_block(32, 48, 4, 2), "multiples of 32, not 32 and 48"),
        (lambda: create_quantized_mlp_block(32, 32, 4, 5), "experts_per_token must be"),
        (lambda: MXFP4MoE(*create_quantized_mlp_block(32, 32, 4, 2), 5), "experts_per_token must be"),
        (lambda: MXFP4MoE(torch.nn.Linear(32, 3), MXFP4Experts(4, 32, 64), MXFP4Experts(4, 32, 32), 2), "gate must"),
        (lambda: MXFP4MoE(torch.nn.Linear(32, 4), MXFP4Experts(4, 32, 64), MXFP4Experts(4, 32, 32), 2), "needs swiglu"),
    ],
)
def test_what_activations_and_experts_refuse(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_experts_give_every_expert_s_output(where, dtype):
    experts = MXFP4Experts(3, 64, 20, activation="swiglu", device=where)
    x = torch.randn(2, 5, 64, device=where).to(dtype)
    y = experts(x)
    assert y.shape == (3, 2, 5, 10)
    for e in range(3):
        alone = MXFP4Linear.from_quantized(Quantized(experts.codes[e], experts.scales[e]), experts.bias[e])
        assert same_bits(y[e], MXFP4LinearWithActivation.around(alone)(x))
    assert experts(x[:0]).shape == (3, 0, 5, 10)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_an_mlp_block_is_its_router_and_experts_put_together(where, dtype):
    """Softmax after top-k, over what the experts' modules give alone: the block takes another way to the same value."""
    gate, mlp1, mlp2 = create_quantized_mlp_block(
        64, 32, 6, 2, swiglu_limit=0.25, alpha=0.5, device=where, dtype=torch.float32
    )
    block = MXFP4MoE(gate, mlp1, mlp2, experts_per_token=2)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    x = torch.randn(4, 3, 64, device=where).to(dtype)
    half = x.bfloat16() if dtype == torch.float32 else x
    with torch.no_grad():
        logits = half.double() @ gate.weight.to(half.dtype).double().T + gate.bias.double()
        weights, ids = logits.topk(2)
        outputs = torch.stack([mlp2(one)[e] for e, one in enumerate(mlp1(half))], -2).double()  # (4, 3, E, H)
        chosen = outputs.gather(-2, ids[..., None].expand(-1, -1, -1, 64))
        wanted = (weights.softmax(-1)[..., None] * chosen).sum(-2)
        y = block(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    scale = (weights.softmax(-1)[..., None] * chosen.abs()).sum(-2)
    assert bool(((y.double() - wanted).abs() <= 2**-7 * scale + 2**-20).all())  # outputs above are rounded, then y is
    assert block(x[:0]).shape == (0, 3, 64)


def test_an_mlp_block_is_saved_and_loaded_bit_for_bit(tmp_path):
    saved, loaded = (MXFP4MoE(*create_quantized_mlp_block(64, 32, 4, 2), 2) for _ in range(2))
    loaded.load_state_dict(through_torch(saved.state_dict(), tmp_path), strict=True)
    assert same_state(saved, loaded)
    x = torch.randn(3, 64)
    assert same_bits(saved(x), loaded(x))


# Names of other libraries


def test_other_libraries_names_are_the_same_things(where, capsys):
    assert compat.MXLinear is MXFP4Linear
    quantizer = compat.MXFP4Quantizer(block_size=32, scale_format="e8m0")
    weight = torch.randn(9, 45, device=where)
    packed, scales = quantizer.quantize(weight)
    assert same_bits(packed, mxfp4.quantize(weight)[0])
    back = quantizer.dequantize(packed, scales, weight.shape)
    assert same_bits(back, mxfp4.dequantize(packed, scales)[:, :45])
    assert quantizer.dequantize(packed, scales).shape == (9, 64)
    x = torch.randn(3, 45, device=where)
    layer = torch.nn.Linear(45, 9, bias=False, device=where)
    layer.weight.data = weight
    assert same_bits(compat.quant_matmul(x, packed, scales), MXFP4Linear.from_linear(layer)(x))
    model = Tied()
    assert len(compat.quantize_model_mxfp4(model, block_size=32, skip="layers").replaced) == 2
    compat.print_architecture_info()
    assert re.search(r"^Class: +(host|sm_\d+)$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compat.MXFP4Quantizer(block_size=16), "blocks of 32 elements .*, not 16"),
        (lambda: compat.MXFP4Quantizer(scale_format="bf16"), "e8m0 scales .*, not 'bf16'"),
        (lambda: compat.quantize_model_mxfp4(Tied(), block_size=64), "not 64"),
        (
            lambda: compat.MXFP4Quantizer().dequantize(*mxfp4.quantize(torch.ones(2, 32)), (3, 32)),
            r"not those of a tensor \(3, 32\)",
        ),
        (lambda: compat.benchmark_linear_layers(32, 32, 32, 1, 0), "num_iterations must be at least 1"),
        (lambda: compat.benchmark_linear_layers(32, 32, 32, 1, 1.5), r"num_iterations must be an integer, not 1\.5"),
        (lambda: compat.benchmark_linear_layers(32, "a", 32, 1, 1), "hidden_size must be an integer, not 'a'"),
        (lambda: compat.benchmark_linear_layers(32, 32, 32, 1, 1, device="tpu"), "no device 'tpu' on this machine"),
        (lambda: compat.MXFP4Quantizer().quantize(None), r"tensor must be a torch\.Tensor, not NoneType"),
        (lambda: compat.MXFP4Quantizer().quantize(torch.ones(2, 32, device="meta")), "meta device has no values"),
        (lambda: compat.MXFP4Quantizer().dequantize(None, None), r"codes must be a torch\.Tensor, not NoneType"),
        (
            lambda: compat.MXFP4Quantizer().dequantize(*mxfp4.quantize(torch.ones(2, 32)), 64),
            r"shape must be sizes \(\.\., K\), not 64",
        ),
        (lambda: compat.quant_matmul(None, *mxfp4.quantize(torch.ones(2, 32))), "activations must be a torch.Tensor"),
        (lambda: compat.quantization_accuracy(32, 0, 32, 1, 1), "must be positive, not 32, 0, 32 and 1"),
    ],
)
def test_what_other_libraries_promise_and_mxfp4_does_not_have(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_benchmark_and_accuracy_report_what_they_measured(where):
    times = compat.benchmark_linear_layers(64, 96, 33, batch_size=4, num_iterations=3, device=where)
    assert times["speedup"] == times["standard_seconds"] / times["mxfp4_seconds"] > 0
    assert times["standard_bytes"] == 2 * (96 * 64 + 96 + 33 * 96 + 33)
    assert times["mxfp4_bytes"] == mxfp4.nbytes((96, 64)) + mxfp4.nbytes((33, 96)) + 4 * (96 + 33)
    errors = compat.quantization_accuracy(64, 96, 33, batch_size=16, num_tests=3, device=where)
    assert 0 < errors["kernel_error_mean"] <= errors["kernel_error_max"] < 2**-8
    assert 0.09 < errors["quantization_error_mean"] <= errors["quantization_error_max"] < 0.16
    assert not compat.test_quantization_accuracy.__test__
    assert compat.test_quantization_accuracy is compat.quantization_accuracy
