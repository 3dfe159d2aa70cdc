"""What is no tensor, no weight, no number or no cache is one sentence, too, and nothing has been launched by then."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from mxharness import functional, mxfp4, nn
from mxharness.device import open_device
from mxharness.errors import UserError
from mxharness.mxfp4 import Quantized


def weight(*shape):
    return mxfp4.quantize(torch.ones(shape))


X = torch.ones(2, 64, dtype=torch.bfloat16)
W = weight(32, 64)
IDS = torch.tensor([0, 1])
STARTS = torch.zeros(1, dtype=torch.int32)
ROWS = torch.ones(1, 2, 2, 32, dtype=torch.bfloat16)
ROPE = functional.Rope(functional.rope_table(8, 32))
CALLS = {
    "quantize": (functional.quantize, {"x": X}),
    "dequantize": (functional.dequantize, {"weight": W}),
    "gemm": (functional.gemm, {"x": X, "weight": W}),
    "gemm_bias": (functional.gemm_bias, {"x": X, "weight": W, "bias": torch.ones(32)}),
    "gemm_batch": (functional.gemm_batch, {"x": X, "weights": weight(2, 32, 64), "bias": torch.ones(2, 32)}),
    "persistent": (functional.persistent, {"weight": W}),
    "gemm_persistent": (functional.gemm_persistent, {"x": X}),
    "dense": (functional.dense, {"x": X, "w": torch.ones(8, 64, dtype=torch.bfloat16)}),
    "gemm_profile": (functional.gemm_profile, {"x": X, "weight": W}),
    "embedding_lookup": (functional.embedding_lookup, {"ids": IDS, "table": W}),
    "embedding_lookup_batch": (functional.embedding_lookup_batch, {"ids": IDS[None], "table": W}),
    "embedding_cache": (functional.embedding_cache, {"table": W}),
    "add_position_embeddings": (functional.add_position_embeddings, {"x": X, "positions": W}),
    "rms_norm": (functional.rms_norm, {"x": X, "weight": torch.ones(64)}),
    "layer_norm": (functional.layer_norm, {"x": X, "weight": torch.ones(64)}),
    "ffn_forward": (functional.ffn_forward, {"x": X, "up": weight(32, 64), "down": weight(64, 32)}),
    "swiglu": (functional.swiglu, {"x": X}),
    "moe_router": (functional.moe_router, {"x": X, "weight": X, "bias": None}),
    "lm_head_forward": (functional.lm_head_forward, {"x": X, "weight": W}),
    "lm_head_greedy": (functional.lm_head_greedy, {"x": X, "weight": W}),
    "lm_head_sample": (functional.lm_head_sample, {"x": X, "weight": W, "uniforms": torch.zeros(2)}),
    "apply_rope": (functional.apply_rope, {"x": ROWS, "rope": ROPE, "positions": STARTS}),
    "kv_cache_append": (functional.kv_cache_append, {"k": ROWS, "v": ROWS, "positions": STARTS}),
}
NO_TENSORS = (None, 3, 1.5, "cpu", [1.0], torch.eye(64).to_sparse())


class Idle:
    """The host device, but that it launches nothing."""

    def __init__(self) -> None:
        self._device = open_device("host")

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def launch(self, *_: object) -> None:
        """Never: what is refused is refused before."""
        pytest.fail("a kernel was launched")


def cache(**options: object):
    return functional.kv_cache(1, 2, 8, 32, **options)


def needed(name: str) -> dict[str, object]:
    """Arguments of CALLS[name] that only a device can make."""
    made = {"gemm_persistent": ("weight", lambda: functional.persistent(W)), "kv_cache_append": ("cache", cache)}
    return {made[name][0]: made[name][1]()} if name in made else {}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_is_refused(name):
    function, arguments = CALLS[name]
    arguments = arguments | needed(name)
    device = Idle()
    for argument in arguments:
        for wrong in NO_TENSORS:
            if wrong is None and argument == "bias":
                continue  # there is none, then
            with pytest.raises(UserError, match=r"must be|is no|needs|takes"):
                function(**arguments | {argument: wrong}, device=device)
    for wrong in ("host", torch.device("cpu"), 3):
        with pytest.raises(UserError, match=r"device must be what mxharness\.device\.open_device gives"):
            function(**arguments, device=wrong)


@pytest.mark.parametrize("wrong", [(W.codes,), (*W, W.codes), "ab", Quantized(None, W.scales), [1, 2]])
def test_a_weight_is_a_pair_of_tensors(wrong):
    with pytest.raises(UserError, match=r"must be a (pair Quantized|torch\.Tensor)"):
        functional.gemm(X, wrong, device=Idle())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(functional.embedding_lookup, IDS, W, padding_id="x"), "padding_id must be an integer, not 'x'"),
        (partial(functional.embedding_lookup, IDS, W, K=63.5), "K must be an integer, not 63.5"),
        (partial(functional.rms_norm, X, torch.ones(64), "x"), "eps must be a number, not 'x'"),
        (partial(functional.rms_norm, X, torch.ones(64), 1e300), "eps must be a positive number"),
        (partial(functional.rms_norm, X, torch.ones(64), 1e-300), "eps must be a positive number"),
        (partial(functional.swiglu, X, alpha=None), "alpha must be a number, not None"),
        (partial(functional.swiglu, X, alpha=1e300), "alpha must be a number, not 1e\\+300"),
        (partial(functional.swiglu, X, limit=[1]), r"limit must be a number, not \[1\]"),
        (partial(functional.moe_router, X, X, None, 1.5), "k must be an integer, not 1.5"),
        (partial(functional.lm_head_forward_topk, X, W, 1.5), "k must be an integer, not 1.5"),
        (partial(functional.lm_head_forward_topp, X, W, None), "p must be a number, not None"),
        (partial(functional.lm_head_forward_temperature, X, W, "hot"), "temperature must be a number, not 'hot'"),
        (partial(functional.lm_head_probabilities, X, W, temperature=math.nan), "temperature must be a positive"),
        (partial(functional.gemm_profile, X, W, repeats=math.inf), "repeats must be an integer, not inf"),
    ],
)
def test_what_is_no_number_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(device=Idle())


def test_numbers_of_numpy_and_torch_are_numbers():
    wanted = functional.lm_head_forward_topk(X, W, 2, temperature=0.5)
    got = functional.lm_head_forward_topk(X, W, torch.tensor(2), temperature=torch.tensor(0.5))  # type: ignore[arg-type]
    assert torch.equal(got, wanted)


def test_tables_of_rotations_refuse():
    for wrong, message in ((functional.Yarn(factor=0), "factor must be a positive"), (3, "scaling must be a Yarn")):
        with pytest.raises(UserError, match=message):
            functional.rope_table(4, 32, scaling=wrong)
    with pytest.raises(UserError, match="length must be an integer"):
        functional.rope_table(1.5, 32)


def test_scales_of_a_dense_weight_must_fit_it():
    half = X.half()
    for scales in (torch.ones(2, 1, dtype=torch.uint8), torch.ones(2, 2), torch.ones(4, dtype=torch.uint8)):
        with pytest.raises(UserError, match=r"scales must be uint8 of shape \(2, 2\)"):
            functional.dense(half, half, scales=scales, device=Idle())
    with pytest.raises(UserError, match="a bf16 w holds its scales already"):
        functional.dense(X, X, scales=torch.ones(2, 2, dtype=torch.uint8), device=Idle())


@pytest.mark.parametrize("last", [2**31 - 1, 2**31 - 2, 2**30])
def test_an_end_past_32_bits_writes_nothing(last):
    held = cache()
    positions = torch.tensor([last], dtype=torch.int32)
    with pytest.raises(UserError, match="positions must be below 1073741824"):
        functional.kv_cache_append(held, ROWS, ROWS, positions, device=Idle())
    assert not held.k.any()


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(1, 2, 4, 32, dtype=torch.bfloat16)},
        {"v": torch.zeros(1, 1, 8, 32, dtype=torch.bfloat16)},
        {"v": None},
        {"k": torch.zeros(16, 32, dtype=torch.bfloat16)},
        {"v_scales": torch.zeros(1, 2, 8, 1, dtype=torch.uint8)},
        {"k_scales": torch.zeros(1, 2, 8, 1, dtype=torch.uint8)},
        {"table": torch.zeros(1, 3, dtype=torch.int32)},
        {"length": 16},
        {"batch": 2},
        {"head_dim": "x"},
        {"dtype": torch.float16},
    ],
)
def test_a_cache_that_does_not_hold_together_is_refused(change):
    held = replace(cache(), **change)
    for call in (
        partial(functional.kv_cache_append, held, ROWS, ROWS, STARTS),
        partial(functional.kv_cache_read, held, 1),
    ):
        with pytest.raises(UserError, match="cache"):
            call(device=Idle())


def test_dequantised_tables_and_weights_that_do_not_hold_together_are_refused():
    table = functional.embedding_cache(W)
    with pytest.raises(UserError, match=r"the cache's table must be \(64, 64\), not \(32, 64\)"):
        functional.embedding_lookup_cached(IDS, replace(table, shape=(64, 64)), device=Idle())
    with pytest.raises(UserError, match="must be what embedding_cache"):
        functional.embedding_lookup_cached(IDS, W, device=Idle())
    operand = functional.persistent(W)
    with pytest.raises(UserError, match=r"this persistent weight is \(64, 64\), its operand \(32, 64\)"):
        functional.gemm_persistent(X, replace(operand, shape=(64, 64)), device=Idle())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.MXFP4Linear(32, 4)(None), r"x must be a torch\.Tensor, not NoneType"),
        (lambda: nn.MXFP4Linear("a", 4), "in_features must be an integer, not 'a'"),
        (lambda: nn.MXFP4Linear(32.0, 4), r"in_features must be an integer, not 32\.0"),
        (lambda: nn.MXFP4Linear(32, 4, device="tpu"), "no device 'tpu' on this machine"),
        (lambda: nn.MXFP4Linear.from_quantized(None), "must be a pair"),
        (lambda: nn.MXFP4Linear.from_quantized(weight(4, 32), [1.0]), r"bias must be a torch\.Tensor, not list"),
        (lambda: nn.MXFP4Embedding(4, 32, 1.5), r"padding_idx must be an integer, not 1\.5"),
        (lambda: nn.MXFP4Embedding(4, 32)([1]), r"ids must be a torch\.Tensor, not list"),
        (lambda: nn.MXFP4Embedding(4, 32)(torch.empty(0)), "ids must be int32 or int64, not torch.float32"),
        (lambda: nn.MXFP4LinearWithActivation(32, 4, swiglu_limit=None), "swiglu_limit must be a number"),
        (lambda: nn.MXFP4LinearWithActivation(32, 4, alpha=math.nan), "alpha must be a number, not nan"),
        (lambda: nn.MXFP4LinearWithActivation.around(torch.nn.Linear(32, 4)), "goes around an MXFP4Linear"),
        (lambda: nn.MXFP4Experts(2.5, 32, 4), r"num_experts must be an integer, not 2\.5"),
        (lambda: nn.MXFP4MoE(None, None, None, 1), "two MXFP4Experts, not NoneType, NoneType, NoneType"),
        (lambda: nn.create_quantized_mlp_block("a", 32, 4, 2), "hidden_size must be an integer, not 'a'"),
        (lambda: nn.create_quantized_mlp_block(32, 32, 4, 1.5), "experts_per_token must be an integer"),
        (lambda: nn.create_quantized_mlp_block(32, 32, 4, 2, dtype="bf16"), "a module computes in .* not bf16"),
        (lambda: nn.quantize_model("gpt2"), "takes a torch.nn.Module, not str"),
        (lambda: nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 4)), skip=3), "skip takes names .* not 3"),
        (lambda: nn.quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 4)), skip=[3]), "skip takes names"),
    ],
)
def test_modules_refuse_what_is_no_tensor_and_no_size(call, message):
    with pytest.raises(UserError, match=message):
        call()


def block(held, **options: object):
    """A whole attention block over `held`."""
    x, output = torch.ones(1, 2, 64, dtype=torch.bfloat16), weight(64, 64)
    arguments = {"qkv": weight(192, 64), "output": output, "positions": STARTS} | options
    return functional.multi_head_attention(x, cache=held, device=Idle(), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2.0}, r"window must be an integer, not 2\.0"),
        ({"window": "x"}, "window must be an integer, not 'x'"),
        ({"scale": "x"}, "scale must be a number, not 'x'"),
        ({"scale": math.nan}, "scale must be a finite float32 number, not nan"),
        ({"scale": 1e300}, "scale must be a finite float32 number"),
        ({"qkv": None}, "qkv weight must be a pair"),
        ({"qkv": functional.Projections(W, None, W)}, "k weight must be a pair"),
        ({"positions": torch.tensor([2**31 - 1], dtype=torch.int32)}, "positions must be below"),
    ],
)
def test_a_whole_block_is_refused_before_its_cache_is_written(options, message):
    held = cache()
    with pytest.raises(UserError, match=message):
        block(held, **options)
    assert not held.k.any()


def test_attention_refuses_what_is_no_cache_and_no_window():
    q, lengths = ROWS, torch.full((1,), 2, dtype=torch.int32)
    with pytest.raises(UserError, match="cache must be what kv_cache"):
        functional.attention(q, None, lengths, device=Idle())
    with pytest.raises(UserError, match=r"window must be an integer, not 2\.0"):
        functional.attention(q, cache(), lengths, window=2.0, device=Idle())
    with pytest.raises(UserError, match=r"bias must be QKV"):
        functional.qkv_projection(X, W, W, W, bias=(torch.ones(32),), device=Idle())
    with pytest.raises(UserError, match="heads must be an integer"):
        functional.fused_qkv_projection(X, weight(96, 64), 1.0, 1, 32, device=Idle())
    with pytest.raises(UserError, match=r"x must be a torch\.Tensor"):
        functional.attention_output_projection(None, W, device=Idle())


def test_a_window_past_every_position_is_none():
    held, lengths = cache(), torch.full((1,), 2, dtype=torch.int32)
    functional.kv_cache_append(held, ROWS, ROWS, STARTS)
    assert torch.equal(
        functional.attention(ROWS, held, lengths, window=2**40), functional.attention(ROWS, held, lengths)
    )
