"""The catalogue of planted faults: bugs that really happened in other projects, by the consumer they sit in."""

from __future__ import annotations

from mxharness.planted import decoding, embedding, gemm, lm_head
from mxharness.planted.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *decoding.FAULTS,
    *gemm.FAULTS,
    *embedding.FAULTS,
    *lm_head.FAULTS,
)
