"""The catalogue of planted faults: bugs that really happened in other projects, by the consumer they sit in."""

from __future__ import annotations

from mxharness.faults.planted import (
    attention,
    decoding,
    embedding,
    encoding,
    ffn,
    gemm,
    kv_cache,
    lm_head,
    moe,
    narrow,
    norm,
    paths,
)
from mxharness.faults.planted.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *decoding.FAULTS,
    *encoding.FAULTS,
    *gemm.FAULTS,
    *paths.FAULTS,
    *norm.FAULTS,
    *ffn.FAULTS,
    *embedding.FAULTS,
    *lm_head.FAULTS,
    *attention.FAULTS,
    *kv_cache.FAULTS,
    *moe.FAULTS,
    *narrow.FAULTS,
)
