"""What embeddings and LM heads refuse, in one sentence and before anything runs; what they do where nobody looks."""

from __future__ import annotations

import math

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.device import open_device
from mxharness.errors import UserError
from mxharness.execution import Fenced
from mxharness.mxfp4 import Quantized

TABLE = mxfp4.quantize(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
IDS = torch.tensor([1, 0, 9])
X = torch.ones(3, 64, dtype=torch.bfloat16)
UNIFORMS = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
EVERY_HEAD = (
    functional.lm_head_forward,
    lambda x, w, **kw: functional.lm_head_forward_temperature(x, w, 0.5, **kw),
    lambda x, w, **kw: functional.lm_head_forward_topk(x, w, 1, **kw),
    lambda x, w, **kw: functional.lm_head_forward_topp(x, w, 0.5, **kw),
    functional.lm_head_greedy,
    functional.lm_head_probabilities,
    lambda x, w, **kw: functional.lm_head_sample(x, w, UNIFORMS, **kw),
    lambda x, w, **kw: functional.lm_head_sample(x, w, UNIFORMS, temperature=0, **kw),
)


@pytest.fixture
def idle():
    """A device on which nothing may have run."""
    device = Fenced(open_device("host"))
    yield device
    assert device.launches == 0


@pytest.mark.parametrize(
    ("ids", "keywords", "message"),
    [
        (torch.tensor([1, 10, -3]), {}, r"ids\[1\] is 10, the vocabulary has 10 ids \(0..9\)"),
        (torch.tensor([1, 2, -1]), {}, r"ids\[2\] is -1, the vocabulary has 10 ids"),
        (torch.tensor([2**40]), {}, r"ids\[0\] is 1099511627776"),
        (torch.tensor([1.0]), {}, "ids must be int32 or int64, not torch.float32"),
        (torch.tensor([True]), {}, "ids must be int32 or int64, not torch.bool"),
        (torch.tensor([], dtype=torch.int64), {}, r"ids must be \(T\) with at least one id, not \(0,\)"),
        (torch.tensor([[1]]), {}, r"ids must be \(T\) with at least one id, not \(1, 1\)"),
        (torch.arange(6)[::2], {}, "ids must be contiguous"),
        (IDS.to("meta"), {}, "ids is on meta"),
        (IDS, {"dtype": torch.float64}, "an embedding is float32, bfloat16 or float16, not torch.float64"),
        (IDS, {"K": 32}, r"K = 32 does not fit a table of 64 columns; it must be in 33\.\.64"),
        (IDS, {"K": 65}, "K = 65 does not fit"),
        (IDS, {"padding_id": 10}, r"padding_id is 10, the vocabulary has 10 ids"),
        (IDS, {"padding_id": -1}, "padding_id is -1"),
    ],
)
def test_lookups_refuse(idle, ids, keywords, message):
    with pytest.raises(UserError, match=message):
        functional.embedding_lookup(ids, TABLE, device=idle, **keywords)


def test_a_batch_names_the_place_of_the_bad_id(idle):
    with pytest.raises(UserError, match=r"ids\[1, 2\] is 11"):
        functional.embedding_lookup_batch(torch.tensor([[0, 1, 2], [3, 4, 11]]), TABLE, device=idle)
    with pytest.raises(UserError, match=r"ids must be \(B, T\) with at least one id, not \(3,\)"):
        functional.embedding_lookup_batch(IDS, TABLE, device=idle)


def test_a_table_that_does_not_fit_is_refused(idle):
    with pytest.raises(UserError, match="codes must be"):
        functional.embedding_lookup(IDS, Quantized(TABLE.codes, TABLE.scales[:, :1]), device=idle)
    with pytest.raises(UserError, match="must be uint8"):
        functional.embedding_lookup(IDS, Quantized(TABLE.codes.int(), TABLE.scales), device=idle)


def test_a_cache_says_its_size_and_is_gone_once_released(idle):
    cache = functional.embedding_cache(TABLE, torch.float32, 50)
    assert (cache.shape, cache.nbytes) == ((10, 50), 2000)
    with pytest.raises(UserError, match=r"ids\[0\] is 10"):
        functional.embedding_lookup_cached(torch.tensor([10]), cache, device=idle)
    cache.release()
    cache.release()
    assert cache.nbytes == 0
    with pytest.raises(UserError, match="this embedding cache was released; make another"):
        functional.embedding_lookup_cached(IDS, cache, device=idle)


@pytest.mark.parametrize(
    ("x", "positions", "start", "message"),
    [
        (X, X, 1, r"start is 1: 3 positions from there are not within the table's 3 \(0\.\.2\)"),
        (X, X, -1, "start is -1"),
        (X, X, 0.5, "start is 0.5"),
        (X, TABLE, 8, "start is 8: 3 positions from there are not within the table's 10"),
        (X, TABLE, torch.tensor([0, 10, 2]), r"start\[1\] is 10: 1 position from there are not within"),
        (X[None], TABLE, torch.tensor([8]), r"start\[0\] is 8: 3 positions"),
        (X[None], TABLE, torch.tensor([-1]), r"start\[0\] is -1"),
        (X, TABLE, torch.tensor([0, 1]), r"start must be \(3,\) along x's first dimension"),
        (X, TABLE, torch.tensor([0.0, 1, 2]), "start must be int32 or int64"),
        (X, X.float(), 0, r"positions must be \(P, 64\) of x's torch.bfloat16, or MXFP4"),
        (X, X[:, :32], 0, r"positions must be \(P, 64\)"),
        (X[:, :32].contiguous(), TABLE, 0, "a table of positions with 64 columns does not fit x's 32"),
        (X.double(), TABLE, 0, "x must be float32, bfloat16 or float16"),
        (X[0], TABLE, 0, r"x must be \(T, K\) or \(B, T, K\) with no size 0"),
        (X[:0], TABLE, 0, "with no size 0"),
        (X.mT, TABLE, 0, "x must be contiguous"),
    ],
)
def test_positions_refuse(idle, x, positions, start, message):
    with pytest.raises(UserError, match=message):
        functional.add_position_embeddings(x, positions, start, device=idle)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_ids_that_nobody_checked_read_nothing(integer):
    """The table's neighbours in memory are finite numbers: NaN can only be the kernel's own."""
    around = torch.zeros(30, 32, dtype=torch.uint8)
    table = Quantized(around[10:20], torch.full((30, 2), 127, dtype=torch.uint8)[10:20])
    ids = torch.tensor([-1, 3, 10, 12], dtype=integer)
    for y in (
        functional.embedding_lookup(ids, table, validate=False, padding_id=3),
        functional.embedding_lookup_cached(ids, functional.embedding_cache(table), validate=False),
        functional.add_position_embeddings(torch.ones(4, 64), table, ids, validate=False),
    ):
        assert y.isnan().all(-1).tolist() == [True, False, True, True]
        assert bool(y[1].isfinite().all())


@pytest.mark.parametrize("K", [2080, 2071])
def test_a_row_may_be_longer_than_a_block_of_threads(monkeypatch, K):
    monkeypatch.setattr("mxharness.functional.embedding._MOST_THREADS", 32)
    table = mxfp4.quantize(torch.randn(5, 2080, generator=torch.Generator().manual_seed(1)))
    right, ids = mxfp4.dequantize(*table)[:, :K], torch.tensor([4, 0, 2])
    cache = functional.embedding_cache(table, torch.float32, K)
    assert torch.equal(functional.embedding_lookup(ids, table, dtype=torch.float32, K=K), right[ids])
    assert torch.equal(functional.embedding_lookup_cached(ids, cache), right[ids])
    x = torch.ones(3, K)
    assert torch.equal(functional.add_position_embeddings(x, table, 1), x + right[1:4])


def test_a_row_of_a_batch_of_ids_will_do():
    ids = torch.arange(9).view(3, 3)[1]  # 24 bytes into its storage
    assert torch.equal(functional.embedding_lookup(ids, TABLE, dtype=torch.float32), mxfp4.dequantize(*TABLE)[3:6])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda kw: functional.lm_head_forward_temperature(X, TABLE, 0, **kw),
            "temperature must be a positive .* not 0",
        ),
        (lambda kw: functional.lm_head_forward_temperature(X, TABLE, -1.0, **kw), "temperature must be"),
        (lambda kw: functional.lm_head_forward_temperature(X, TABLE, math.nan, **kw), "temperature must be .* not nan"),
        (lambda kw: functional.lm_head_forward_temperature(X, TABLE, math.inf, **kw), "temperature must be .* not inf"),
        (
            lambda kw: functional.lm_head_forward_temperature(X, TABLE, 1e-60, **kw),
            "positive float32 number, not 1e-60",
        ),
        (lambda kw: functional.lm_head_forward_temperature(X, TABLE, 1e60, **kw), "positive float32 number"),
        (lambda kw: functional.lm_head_probabilities(X, TABLE, temperature=0, **kw), "temperature must be"),
        (lambda kw: functional.lm_head_forward_topk(X, TABLE, 0, **kw), "k is 0; top-k keeps 1 token or more"),
        (lambda kw: functional.lm_head_forward_topk(X, TABLE, -1, **kw), "top-k keeps 1 to 10 tokens"),
        (lambda kw: functional.lm_head_forward_topk(X, TABLE, 11, **kw), "vocabulary of 10, not 11"),
        (lambda kw: functional.lm_head_forward_topp(X, TABLE, 0.0, **kw), "top-p keeps a share of 0 < p <= 1, not 0.0"),
        (lambda kw: functional.lm_head_forward_topp(X, TABLE, 1.001, **kw), "top-p keeps"),
        (lambda kw: functional.lm_head_forward_topp(X, TABLE, math.nan, **kw), "top-p keeps .* not nan"),
        (
            lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS + 0.5, **kw),
            r"uniforms\[1\] is 1.0; a uniform lies in",
        ),
        (lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS - 1, **kw), r"uniforms\[0\] is -1.0"),
        (lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS * math.nan, **kw), r"uniforms\[0\] is nan"),
        (
            lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS[:2], **kw),
            r"uniforms must be float32 of shape \(3,\)",
        ),
        (lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS.double(), **kw), "uniforms must be float32"),
        (lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS, temperature=-1, **kw), "temperature must be"),
        (lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS, top_k=11, **kw), "vocabulary of 10, not 11"),
        (lambda kw: functional.lm_head_sample(X, TABLE, UNIFORMS, temperature=0, top_p=2, **kw), "top-p keeps"),
    ],
)
def test_heads_refuse_settings(idle, call, message):
    with pytest.raises(UserError, match=message):
        call({"device": idle})


@pytest.mark.parametrize("head", EVERY_HEAD)
def test_heads_refuse_tensors(idle, head):
    for x, weight, message in (
        (X.float(), TABLE, "x must be bfloat16 or float16"),
        (X[:, :32].contiguous(), TABLE, r"x must be \(M, 64\)"),
        (X[:0], TABLE, "at least one row"),
        (X.mT.contiguous().mT, TABLE, "x must be contiguous"),
        (X, Quantized(TABLE.codes[:0], TABLE.scales[:0]), "no size 0"),
        (X, Quantized(TABLE.codes, TABLE.scales[:, :1]), "codes must be"),
    ):
        with pytest.raises(UserError, match=message):
            head(x, weight, device=idle)


def test_too_large_a_vocabulary_is_refused(idle):
    rows = (1 << 22) + 1
    weight = Quantized(torch.empty(rows, 16, dtype=torch.uint8), torch.empty(rows, 1, dtype=torch.uint8))
    with pytest.raises(UserError, match="the vocabulary has 4194305 tokens; an LM head takes 4194304 at most"):
        functional.lm_head_greedy(X[:, :32].contiguous(), weight, device=idle)


def test_a_uniform_that_nobody_checked_draws_nothing():
    uniforms = torch.tensor([1.0, math.nan, 0.5])
    ids = functional.lm_head_sample(X, TABLE, uniforms, validate=False)
    assert ids[:2].tolist() == [-1, -1]
    assert 0 <= int(ids[2]) < 10
