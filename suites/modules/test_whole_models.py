"""A whole model's layers are replaced: what ties, rules and reports come to, and what is left or refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.nn import MXFP4Linear, quantize_model

from .layers import Tied, decoded, same_bits, same_state, through_torch


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
