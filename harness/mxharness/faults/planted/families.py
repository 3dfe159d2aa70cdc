"""The public bug families: what went wrong in other projects, and which planted faults stand for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One kind of bug that was really shipped."""

    cause: str
    seen_in: str
    faults: tuple[str, ...]
    """Names in the catalogue."""


_SWIGLU = (
    "swiglu-limit-on-one-side",
    "swiglu-gate-unlimited",
    "swiglu-gate-limited-below",
    "swiglu-alpha-one",
    "swiglu-plus-one-dropped",
)
_SCALE_BIAS = ("scale-bias-minus-2", "scale-bias-minus-1", "scale-bias-plus-1", "scale-bias-plus-2")
_ATTENTION = (
    "attention-without-softmax",
    "head-stride-of-another-layout",
    "grouped-output-never-written",
)
_MASKS = ("causal-mask-short-by-one", "causal-mask-long-by-one", "window-off-by-one", "sink-dropped", "rope-pair-order")
_SAMPLING = (
    "top-k-keeps-one-less",
    "top-k-keeps-all-ties",
    "top-p-before-renormalising",
    "temperature-after-softmax",
)
_BARRIERS = (
    "barrier-dropped-before-use",
    "barrier-dropped-before-load",
    "barrier-dropped-before-scores",
    "barrier-dropped-before-values",
)
_GATE_AND_UP = (
    "gate-and-up-not-interleaved",
    "gate-and-up-not-alternating",
    "gate-and-up-swapped-interleaved",
    "gate-and-up-swapped",
    "gate-and-up-swapped-in-the-product",
)

FAMILIES: tuple[Family, ...] = (
    Family("split nibbles read as linear", "kekzl/imp PR 567", ("gguf-nibbles-read-as-linear",)),
    Family("first element in the high nibble", "pytorch/ao issue 2939, PR 3123", ("nibbles-swapped",)),
    Family("scale byte off by a constant", "vllm-project/compressed-tensors PR 538, vllm PR 35979", _SCALE_BIAS),
    Family("clamped at 2^-126, decoded as 2^-127", "pytorch/ao issue 1104", ("tiny-blocks-halved",)),
    Family("scale byte 0 decoded as 0", "triton-lang/triton PR 11624, PR 11737", ("scale-byte-0-is-zero",)),
    Family("NaN sentinel compared as a number", "sgl-project/sglang PR 25519", ("nan-test-on-the-scale",)),
    Family(
        "scales read past K/32",
        "triton-lang/triton issue 10772, vllm PR 47910, sglang PR 36456",
        ("scales-past-the-row-few-rows", "scales-past-the-row-many-rows"),
    ),
    Family(
        "packed N floored to tiles",
        "triton-lang/triton PR 10385",
        ("tail-columns-wrap", "vocabulary-tail-wraps"),
    ),
    Family("tile map of another number of warps", "triton-lang/triton PR 9029", ("tile-map-of-eight-warps",)),
    Family(
        "tail of K dropped",
        "triton-lang/triton PR 7203",
        ("k-tail-dropped-few-rows", "k-tail-dropped-many-rows"),
    ),
    Family("wrong backend, silently", "flashinfer issue 3334", ("silent-fallback", "kernel-of-another-dtype")),
    Family("layout applied on one path only", "vllm PR 49335", ("layout-of-one-path",)),
    Family("padded size used as offset", "vllm PR 42595", ("matrix-stride-padded", "expert-bias-stride-padded")),
    Family("gate and up exchanged or not interleaved", "sglang PR 26884, vllm PR 44893", _GATE_AND_UP),
    Family("raw scale byte in the small path", "ml-explore/mlx issue 3762", ("raw-scale-byte-in-the-small-path",)),
    Family("ties away from zero", "ROCm/aiter PR 3992", ("ties-away",)),
    Family("two scale rules mixed", "ROCm/ATOM PR 1601, ROCm/aiter PR 3212", ("two-scale-rules-mixed",)),
    Family("scale of amax / 6 truncated", "vllm PR 43557", ("scale-of-a-sixth-truncated",)),
    Family("sticky bit lost", "tenstorrent/tt-metal issue 51971", ("sticky-bit-lost",)),
    Family("scale of a tiny block underflows", "flashinfer issue 2440", ("tiny-scale-underflows",)),
    Family("amax rounded to bfloat16 first", "pytorch/ao PR 4725", ("amax-rounded-to-bfloat16",)),
    Family("packed along the wrong axis", "triton-lang/triton PR 11734", ("packed-along-the-wrong-axis",)),
    Family("tied embedding decoded on one side", "kekzl/imp PR 395", ("tied-embedding-decoded-on-one-side",)),
    Family("result depends on the batch", "flashinfer issue 3559", ("batch-dependent-path", "root-by-batch")),
    Family(
        "blocks straddle rows",
        "DeepWok/mase PR 321",
        ("blocks-straddle-rows", "embedding-blocks-straddle-rows", "cache-blocks-straddle-rows"),
    ),
    Family("exponents added as integers", "vllm PR 46676, its review", ("exponents-added-without-guards",)),
    Family("negative exponent cast to a byte", "ml-explore/mlx 0.32.4, ggml", ("negative-exponent-wraps",)),
    Family("scale cast to half first", "pytorch/ao, ml-explore/mlx", ("scale-cast-to-half",)),
    Family("flush to zero", "Quark's packer", ("subnormals-flushed",)),
    Family(
        "transposed operand or result", "llama-orch, mxfp4_gemm.cu", ("output-transposed", "tokens-read-as-columns")
    ),
    Family("linear code table", "llama-orch, mxfp4_dequant.cu", ("linear-code-table",)),
    Family("tail written past the end", "llama-orch, mxfp4_dequant.cu", ("tail-written-past-the-end",)),
    Family("half accumulators", "llama-orch, mxfp4_gemm.cu", ("half-accumulators",)),
    Family("no softmax, head stride, unwritten rows", "llama-orch, mxfp4_attention.cu", _ATTENTION),
    Family("return before a barrier", "llama-orch", ("return-before-a-barrier", "idle-warps-return")),
    Family("barrier missing between load and use", "any tiled kernel", _BARRIERS),
    Family("partial sum twice or not at all", "split-K", ("partial-sum-dropped", "partial-sum-added-twice")),
    Family("masks, windows, sinks, RoPE pairs", "attention anywhere", _MASKS),
    Family("the activation of gpt-oss", "SwiGLU with a limit", _SWIGLU),
    Family("top-k, top-p, temperature", "samplers anywhere", _SAMPLING),
    Family(
        "softmax before top-k, experts off by one",
        "routing anywhere",
        ("softmax-before-top-k", "expert-index-off-by-one"),
    ),
)
