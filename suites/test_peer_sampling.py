"""Embedding, LM head and sampling against torch and transformers' samplers, on the same decoded table and logits.

Where a peer is known to differ the difference itself is asserted: transformers' top-k keeps every tie at the threshold,
its top-p keeps the highest ids of a tie, torch's argmax takes NaN for the largest number.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.device import Device
from mxharness.functional import lm_head
from mxharness.mxfp4 import Quantized

pytestmark = pytest.mark.long("transformers")
"""Which takes long to import."""
V, K = 1003, 96
UNIT = 2.0**-24


@pytest.fixture
def warpers() -> ModuleType:
    module: ModuleType = pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is not installed; not compared: its samplers"
    )
    return module


def table(device: Device, rows: int = V, scale: float = 0.3) -> Quantized:
    """An MXFP4 table (rows, K) that serves as embedding and LM head."""
    values = torch.randn(rows, K, generator=torch.Generator().manual_seed(0)) * scale
    return Quantized(*(device.upload(tensor) for tensor in mxfp4.quantize(values)))


def tokens(device: Device, rows: int = 8) -> torch.Tensor:
    """Activations (rows, K) bf16."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1))
    return device.upload(x.to(torch.bfloat16))


def repeated(device: Device) -> Quantized:
    """A table whose rows i and i + 100 are equal."""
    codes, scales = table(device, 100)
    return Quantized(codes.repeat(3, 1), scales.repeat(3, 1))


def warped(warper: Callable[[None, torch.Tensor], torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """Z (M, V) after a transformers warper."""
    return warper(None, z.clone())


def kept(z: torch.Tensor) -> torch.Tensor:
    return z > -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_torchs_but_for_the_padding_id(device: Device, dtype: torch.dtype) -> None:
    weight = table(device)
    ids = device.upload(torch.tensor([0, 1002, 7, 7, 500]))
    decoded = mxfp4.dequantize(*weight, dtype)
    theirs = torch.nn.functional.embedding(ids, decoded, padding_idx=7)
    assert torch.equal(functional.embedding_lookup(ids, weight, dtype=dtype, device=device), theirs)
    ours = functional.embedding_lookup(ids, weight, dtype=dtype, padding_id=7, device=device)
    theirs[2:4] = 0  # torch's padding_idx stops gradients; the row itself is as it was set
    assert torch.equal(ours, theirs)


def test_a_tied_table_is_one_matrix_on_both_sides(device: Device) -> None:
    weight = table(device)
    decoded = mxfp4.dequantize(*weight, torch.bfloat16)  # exact
    ids = device.upload(torch.arange(0, V, 101))
    x = functional.embedding_lookup(ids, weight, device=device)
    assert torch.equal(x, decoded[ids])
    ours = functional.lm_head_forward(x, weight, device=device)
    assert torch.equal(ours, functional.dense(x, decoded, out_dtype=torch.float32, device=device))
    assert torch.equal(ours.argmax(-1), (x.double() @ decoded.double().mT).argmax(-1))


def test_greedy_is_torchs_argmax_but_for_nan(device: Device) -> None:
    for weight in (table(device), repeated(device)):
        x = tokens(device, 64)
        logits = functional.lm_head_forward(x, weight, device=device)
        ids = functional.lm_head_greedy(x, weight, device=device)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, logits.argmax(-1))
    assert bool((ids < 100).all())  # every logit is there three times
    weight.scales[5, 0] = 255
    assert functional.lm_head_greedy(x, weight, device=device).tolist() == [-1] * 64
    assert functional.lm_head_forward(x, weight, device=device).argmax(-1).tolist() == [5] * 64


@pytest.mark.parametrize("temperature", [0.7, 0.3, 2.5])
def test_temperature_has_transformers_bits(device: Device, warpers: ModuleType, temperature: float) -> None:
    x, weight = tokens(device), table(device)
    logits = functional.lm_head_forward(x, weight, device=device)
    ours = functional.lm_head_forward_temperature(x, weight, temperature, device=device)
    exact = logits.double() / torch.tensor(temperature, dtype=torch.float32).double().to(logits.device)
    assert torch.equal(ours, exact.to(torch.float32))
    if device.name == "host":  # torch multiplies by the reciprocal on a GPU
        assert torch.equal(ours, warped(warpers.TemperatureLogitsWarper(temperature), logits))


@pytest.mark.parametrize("k", [1, 5, 40, 1003])
def test_top_k_is_transformers_where_there_is_no_tie(device: Device, warpers: ModuleType, k: int) -> None:
    x, weight = tokens(device), table(device)
    logits = functional.lm_head_forward(x, weight, device=device)
    ours = functional.lm_head_forward_topk(x, weight, k, device=device)
    theirs = warped(warpers.TopKLogitsWarper(k), logits)
    assert bool((kept(ours).sum(-1) == k).all())
    untied = kept(theirs).sum(-1) == k
    assert int(untied.sum()) >= 6
    assert torch.equal(ours[untied], theirs[untied])


def test_top_k_keeps_the_lowest_ids_of_a_tie_and_transformers_all(device: Device, warpers: ModuleType) -> None:
    x, weight = tokens(device), repeated(device)
    logits = functional.lm_head_forward(x, weight, device=device)
    ours = functional.lm_head_forward_topk(x, weight, 8, device=device)  # of the third best logit two
    theirs = warped(warpers.TopKLogitsWarper(8), logits)
    assert bool((kept(ours).sum(-1) == 8).all())
    assert bool((kept(theirs).sum(-1) == 9).all())
    for row in range(len(x)):
        (extra,) = (kept(theirs) & ~kept(ours))[row].nonzero().flatten().tolist()
        tied = (logits[row] == logits[row, extra]).nonzero().flatten().tolist()
        assert extra == max(tied)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.97])
def test_top_p_is_transformers_away_from_rounding(device: Device, warpers: ModuleType, p: float) -> None:
    x, weight = tokens(device, 32), table(device)
    logits = functional.lm_head_forward(x, weight, device=device)
    ours = functional.lm_head_forward_topp(x, weight, p, device=device)
    theirs = warped(warpers.TopPLogitsWarper(p), logits)
    mass = logits.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    clear = (mass - p).abs().amin(-1) > 1e-5  # their cumulated sum is in float32
    assert int(clear.sum()) >= 8
    assert torch.equal(ours[clear], theirs[clear])


def test_top_p_keeps_the_lowest_ids_of_a_tie_and_transformers_as_many(device: Device, warpers: ModuleType) -> None:
    """Which of them transformers keeps is up to torch's sort, which is not stable there."""
    codes, scales = table(device, 1)
    x, weight = tokens(device, 1), Quantized(codes.repeat(8, 1), scales.repeat(8, 1))
    ours = functional.lm_head_forward_topp(x, weight, 0.5, device=device)
    theirs = warped(warpers.TopPLogitsWarper(0.5), functional.lm_head_forward(x, weight, device=device))
    assert kept(ours)[0].tolist() == [True] * 4 + [False] * 4
    assert int(kept(theirs)[0].sum()) == 4


def test_the_whole_chain_is_that_of_generate(device: Device, warpers: ModuleType) -> None:
    x, weight = tokens(device, 32), table(device)
    uniforms = device.upload(torch.rand(32, generator=torch.Generator().manual_seed(2)))
    stages = lm_head.sample_stages(x, weight, uniforms, temperature=0.8, top_k=50, top_p=0.7, device=device)
    z = stages["logits"]
    chain = (warpers.TemperatureLogitsWarper(0.8), warpers.TopKLogitsWarper(50), warpers.TopPLogitsWarper(0.7))
    for warper in chain:
        z = warped(warper, z)
    same = (kept(z) == kept(stages["top_p"])).all(-1)
    assert int(same.sum()) >= 30  # a float32 sum may fall on the other side of p
    drawn = stages["ids"].unsqueeze(-1)
    assert bool(kept(stages["top_p"]).gather(-1, drawn).all())
    cumulated = z.double().softmax(-1).cumsum(-1)
    theirs = torch.searchsorted(cumulated, uniforms.double().unsqueeze(-1), right=True)
    clear = same & ((cumulated - uniforms.double().unsqueeze(-1)).abs().amin(-1) > 1e-6)
    assert int(clear.sum()) >= 28
    assert torch.equal(drawn[clear], theirs[clear])


def test_probabilities_are_torchs(device: Device) -> None:
    x, weight = tokens(device), table(device)
    logits = functional.lm_head_forward(x, weight, device=device).double()
    theirs = logits.softmax(-1)
    ours = functional.lm_head_probabilities(x, weight, device=device).double()
    spread = logits.amax(-1, keepdim=True) - logits
    assert bool(((ours - theirs).abs() <= (2 * spread.amax(-1, keepdim=True) + 6) * UNIT * theirs).all())
    assert bool(((ours.sum(-1) - 1).abs() < 1e-5).all())


def test_evenly_spaced_uniforms_draw_every_token_as_often_as_it_is_probable(device: Device) -> None:
    draws = 4096
    x, weight = tokens(device, 1).repeat(draws, 1), table(device, 50)
    uniforms = device.upload((torch.arange(draws) + 0.5) / draws)
    ids = functional.lm_head_sample(x, weight, uniforms, device=device)
    theirs = functional.lm_head_forward(x[:1], weight, device=device).double().softmax(-1)[0] * draws
    assert bool((ids.diff() >= 0).all())
    assert bool(((ids.bincount(minlength=50) - theirs).abs() < 1.001).all())


def test_no_token_where_torch_refuses_to_draw(device: Device) -> None:
    x, weight = tokens(device, 3), table(device, 40)
    weight.scales[5, 0] = 255
    uniforms = device.upload(torch.full((3,), 0.5))
    assert functional.lm_head_sample(x, weight, uniforms, device=device).tolist() == [-1] * 3
    probabilities = functional.lm_head_probabilities(x, weight, device=device)
    assert bool(probabilities.isnan().all())
    if device.name == "host":  # on a GPU it is an assertion that ends the process's use of it
        with pytest.raises(RuntimeError, match="element < 0"):
            torch.multinomial(probabilities, 1)
